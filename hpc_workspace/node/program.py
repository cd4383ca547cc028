"""The life of a workspace on its node: start, publish, watch, end.

One thread decides; everything else (the door's connections, the server's death, signals) sends it events. Whatever
happens, the way out is the same: the record says why, the container's processes are gone, the scratch is removed.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

from hpc_workspace import clock, procfs
from hpc_workspace.errors import ContainerError, ServerNotReadyError, WorkspaceError
from hpc_workspace.node import server, teardown
from hpc_workspace.node.door import DetachRequested, Door, EndRequested, LeasesChanged
from hpc_workspace.node.identity import Family, NotOursError
from hpc_workspace.node.scratch import Scratch, choose_base, remove_stale
from hpc_workspace.processes import Child
from hpc_workspace.record import Failure, Record, Spec, State
from hpc_workspace.rendezvous import WorkspaceDirectory

log = logging.getLogger(__name__)

HEARTBEAT_S = 30.0
# A client that was killed between the launch and its first lease must not leave a workspace behind.
FIRST_LEASE_S = 120.0
_READY_PROBE_S = 0.02
_STARTS_OF_AN_IMAGE = 2  # about 1 start in 28 of OpenHands' server dies in an import deadlock (1.58)


@dataclass(frozen=True)
class Signalled:
    """This process got a signal that asks for the end, or (USR1) says that the time limit is near."""

    number: int


@dataclass(frozen=True)
class ServerDied:
    """The server's process ended by itself."""

    returncode: int


class EndedEarly(Exception):
    """The end was asked for before the workspace was ready."""


class NodeProgram:
    """Runs one workspace to its end; see the module's docstring."""

    def __init__(self, directory: WorkspaceDirectory) -> None:
        self.directory = directory
        self.spec: Spec = directory.read_spec()
        self._token = directory.read_token()
        self._events: queue.Queue[object] = queue.Queue()
        self._family = Family()
        self._tag = f"{teardown.TAG_NAME}={self.spec.workspace_id}/{self.spec.launch_id}"
        self._started = clock.Deadline(None)
        self._phases_s: dict[str, float] = {}
        self._scratch: Scratch | None = None
        self._plan: server.Plan | None = None
        self._child: Child | None = None
        self._door: Door | None = None
        self._had_lease = False
        self._ends_with_lease = self.spec.ends_with_lease

    def run(self) -> int:
        """Live the workspace's whole life. Returns the exit code: 0 unless it failed."""
        teardown.become_subreaper()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self._events.put(Signalled(number)))
        state: State = "ended"
        failure = None
        try:
            self._start()
            reason = self._watch()
        except EndedEarly as early:
            reason = str(early)
        except WorkspaceError as error:
            state, reason, failure = "failed", error.what, _as_failure(error)
            log.error("failed: %s", error)
        except OSError as error:
            state, reason = "failed", f"the node program failed: {error}"
            failure = Failure(
                kind="ContainerError", what=f"The workspace can't be started on {_node()}.", evidence=str(error)
            )
            log.exception("failed")
        return self._end(state, reason, failure)

    def _start(self) -> None:
        self.directory.touch_heartbeat()
        base = choose_base(os.environ)
        for stale in remove_stale(base):
            log.info("removed the scratch of a dead workspace: %s", stale)
        self._scratch = Scratch(base)
        log.info("scratch: %s", self._scratch.path)
        self._plan = server.make_plan(self.spec, self._scratch, self._token, self.directory.read_environment())
        self._door = Door(
            workspace_id=self.spec.workspace_id,
            token=self._token,
            socket_path=self._scratch.door_socket,
            family=self._family,
            server=lambda: self._plan.address if self._plan and self._child else None,
            events=self._events,
        )
        self._phases_s["prepare"] = self._started.elapsed_s
        self._start_server()
        self._publish("ready")
        log.info(
            "ready after %.2f s: port %d, server pid %d", self._started.elapsed_s, self._door.port, self._child_pid
        )

    def _start_server(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ContainerError: it died.
            ServerNotReadyError: it did not answer in time.
        """
        attempts = _STARTS_OF_AN_IMAGE if self.spec.server == "image" else 1
        for attempt in range(1, attempts + 1):
            began_s = clock.now_s()
            try:
                self._spawn_and_wait()
            except ContainerError as error:
                if attempt == attempts:
                    raise
                log.warning("the server died at its start, trying once more: %s", error.what)
                assert self._scratch is not None
                self._plan = server.make_plan(self.spec, self._scratch, self._token, self.directory.read_environment())
            else:
                self._phases_s["server"] = clock.now_s() - began_s
                return

    def _spawn_and_wait(self) -> None:
        assert self._plan is not None
        child = server.start(self._plan, self.directory.server_log, self._tag)
        self._child = child
        threading.Thread(target=self._await_death, args=(child,), daemon=True).start()
        deadline = clock.Deadline(self.spec.health_check_timeout_s)
        while not self._answers():
            event = self._next_event(_READY_PROBE_S)
            if isinstance(event, ServerDied):
                raise self._server_death(event.returncode)
            if isinstance(event, EndRequested):
                raise EndedEarly("ended by its client before it was ready")
            if isinstance(event, Signalled) and event.number != signal.SIGUSR1:
                raise EndedEarly(f"{signal.Signals(event.number).name} before it was ready")
            if deadline.is_over:
                raise ServerNotReadyError(
                    f"The agent server on {_node()} did not answer within {self.spec.health_check_timeout_s:g} s.",
                    evidence=self._server_tail(),
                    remedy="Raise health_check_timeout if the machine is slow.",
                )

    def _await_death(self, child: Child) -> None:
        while (returncode := child.wait(3600)) is None:
            continue
        if child is self._child:
            self._events.put(ServerDied(returncode))

    def _answers(self) -> bool:
        assert self._plan is not None
        try:
            server.ask(self._plan.address, self._family, "/health")
        except (OSError, ValueError, NotOursError) as error:
            log.debug("not ready: %s", error)
            return False
        return True

    def _watch(self) -> str:
        """Stay until there is a reason to end; returns it in words.

        Raises:
            ContainerError: the server died.
        """
        ready = clock.Deadline(None)
        next_beat = clock.Deadline(0)
        while True:
            if next_beat.is_over:
                next_beat = clock.Deadline(self._beat())
            event = self._next_event(min(next_beat.left_s, 1.0 if self._may_idle() else 30.0))
            if isinstance(event, EndRequested):
                return "closed by its client"
            if isinstance(event, Signalled):
                if event.number != signal.SIGUSR1:
                    return f"got {signal.Signals(event.number).name}"
                log.warning("the job's time limit is near")
            if isinstance(event, ServerDied):
                raise self._server_death(event.returncode)
            if isinstance(event, DetachRequested):
                self._ends_with_lease = False
            if isinstance(event, LeasesChanged):
                self._had_lease = self._had_lease or event.count > 0
            if reason := self._abandoned(ready.elapsed_s):
                return reason

    def _may_idle(self) -> bool:
        return self._door is not None and self._door.leases == 0

    def _abandoned(self, ready_for_s: float) -> str:
        """Why there is nobody left to run for; empty while there is."""
        assert self._door is not None
        if self._door.leases:
            return ""
        if self._ends_with_lease:
            if self._had_lease:
                return "its client is gone"
            return "its client never came" if ready_for_s > FIRST_LEASE_S else ""
        timeout_s = self.spec.idle_timeout_s
        if timeout_s is None or self._door.quiet_s < timeout_s or self._runs_a_command(timeout_s):
            return ""
        return f"idle for {timeout_s:g} s"

    def _runs_a_command(self, timeout_s: float) -> bool:
        """Whether the server is at work for somebody who is not connected."""
        assert self._plan is not None
        try:
            info = server.ask(self._plan.address, self._family, "/server_info")
        except (OSError, ValueError, NotOursError) as error:
            log.warning("the server does not say whether it is idle: %s", error)
            return False
        idle_s = info.get("idle_time")
        return bool(info.get("running_commands")) or (isinstance(idle_s, (int, float)) and idle_s < timeout_s)

    def _beat(self) -> float:
        """Touch the heartbeat; returns when to do it next. A disk that is full or away for a while is survived."""
        teardown.reap_orphans(except_pid=self._child_pid)
        try:
            self.directory.touch_heartbeat()
        except FileNotFoundError:
            # The directory was removed: nobody can find this workspace any more.
            self._events.put(EndRequested())
        except OSError as error:
            log.warning("no heartbeat: %s", error)
        return HEARTBEAT_S * random.uniform(0.9, 1.1)  # noqa: S311 - jitter, not a secret

    def _next_event(self, timeout_s: float) -> object | None:
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    @property
    def _child_pid(self) -> int:
        return self._child.pid if self._child else 0

    def _server_death(self, returncode: int) -> ContainerError:
        how = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
        return ContainerError(
            f"The agent server on {_node()} ended with {how}.",
            evidence=self._server_tail(),
            remedy=_remedy_for(self._server_tail()),
        )

    def _server_tail(self) -> str:
        tail = self.directory.log_tail(self.directory.server_log)
        return f"Last lines of {self.directory.server_log}:\n{tail}" if tail else "It printed nothing."

    def _publish(self, state: State, reason: str | None = None, failure: Failure | None = None) -> None:
        self.directory.publish(
            Record(
                workspace_id=self.spec.workspace_id,
                launch_id=self.spec.launch_id,
                job_id=os.environ.get("SLURM_JOB_ID"),
                restart_count=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
                state=state,
                node=_node(),
                port=self._door.port if self._door else 0,
                socket=self._door.socket_path if self._door else "",
                pid=os.getpid(),
                runtime=self._plan.runtime if self._plan else self.spec.runtime,
                server=self.spec.server,
                working_dir=self._plan.working_dir if self._plan else self.spec.working_dir,
                node_scratch=str(self._scratch.path) if self._scratch else "",
                started_at=clock.wall_s(),
                phases_s={name: round(seconds, 4) for name, seconds in self._phases_s.items()},
                exit_reason=reason,
                failure=failure,
            )
        )

    def _end(self, state: State, reason: str, failure: Failure | None) -> int:
        """Leave nothing behind, then say how it ended."""
        log.info("ending: %s", reason)
        left = self._clean_up()
        if left and failure is None:
            state = "failed"
            failure = Failure(
                kind="ContainerError", what=f"The workspace on {_node()} left something behind.", evidence=left
            )
        if left:
            log.error("left behind: %s", left)
        try:
            self.directory.forget_secrets()
            self._publish(state, reason, failure)
        except (WorkspaceError, OSError) as error:
            log.error("the record can't be written: %s", error)
        if self._door:
            self._door.close(reason if failure is None else failure.what)
        return 0 if state == "ended" else 1

    def _clean_up(self) -> str:
        """End every process, remove the scratch. Returns what is left, in words; empty is the proof of nothing."""
        grace_s = self._plan.grace_s if self._plan else 0.0
        processes = teardown.end_family(self._child_pid or None, self._tag, grace_s=grace_s)
        left = [f"process {process.pid} ({process.name})" for process in processes]
        if self._scratch:
            left += [f"mount {point}" for point in procfs.mounts_below(str(self._scratch.path))]
            left += [] if left else self._scratch.remove()
        return ", ".join(left)


def _as_failure(error: WorkspaceError) -> Failure:
    return Failure(kind=type(error).__name__, what=error.what, evidence=error.evidence, remedy=error.remedy)


def _remedy_for(tail: str) -> str:
    """What to try, where the log shows a known cause."""
    for sign, remedy in _KNOWN_CAUSES.items():
        if sign in tail:
            return remedy
    return ""


# Source: messages of Apptainer 1.4.5, seen in its log.
_KNOWN_CAUSES = {
    "user namespace": "This node allows no unprivileged user namespaces: ask its administrators.",
    "fakeroot": "This node may have no fakeroot for you (no lines in /etc/subuid): set use_fakeroot=False.",
    "no space left": "The node's disk is full: free some of it, or point TMPDIR at one with room.",
}


def _node() -> str:
    """This node's name as Slurm and SSH know it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def main(path: Path) -> int:
    """Run the workspace in the directory `path`. Returns the exit code."""
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        program = NodeProgram(WorkspaceDirectory(path.absolute()))
    except WorkspaceError as error:
        log.error("%s", error)
        return 2
    return program.run()
