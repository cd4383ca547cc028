"""The life of a workspace on its node: start, publish, watch, end.

One thread decides; everything else (the door's connections, the server's death, signals) sends it events. Whatever
happens, the way out is the same: the container's processes are gone, the scratch is removed, the record says why. For
the case that this program is killed itself, its warden stands by (`warden.py`).
"""

from __future__ import annotations

import logging
import os
import queue
import random
import signal
import socket
import stat
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_workspace import clock, procfs, teardown
from hpc_workspace.errors import RendezvousStaleError, WorkspaceError
from hpc_workspace.node import leftovers, server
from hpc_workspace.node.door import Door
from hpc_workspace.node.events import (
    DetachRequested,
    EndedEarly,
    EndRequested,
    LauncherGone,
    LeasesChanged,
    ServerDied,
    Signalled,
    Superseded,
)
from hpc_workspace.node.identity import Family, NotOursError
from hpc_workspace.node.plan import Ingredients
from hpc_workspace.node.scratch import Scratch, candidate_bases, choose_base, free_bytes
from hpc_workspace.node.startup import Running, Startup, server_death
from hpc_workspace.owner import Owner
from hpc_workspace.record import Failure, Record, Spec, State
from hpc_workspace.rendezvous import WorkspaceDirectory

log = logging.getLogger(__name__)

HEARTBEAT_S = 30.0
# A client that was killed between the launch and its first lease must not leave a workspace behind.
FIRST_LEASE_S = 120.0
_UNANSWERED_LOOKS_MAX = 60
_LEFT_SAID_MAX = 100
# A TERM that comes this near to the time limit is the limit's.
_AT_LIMIT_S = 30.0
_SIGNAL_AFTER_S = 1.0
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class NodeProgram:
    """Runs one workspace to its end; see the module's docstring.

    Args:
        owner: the warden, whose mark everything carries.
    """

    def __init__(self, directory: WorkspaceDirectory, owner: Owner) -> None:
        self.directory = directory
        self.spec: Spec = directory.read_spec()
        self._owner = owner
        self._token = directory.read_token()
        # SimpleQueue: a signal handler may put into it while this very thread gets.
        self._events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._started = clock.Deadline(None)
        self._phases_s: dict[str, float] = {}
        self._scratch: Scratch | None = None
        self._startup: Startup | None = None
        self._running: Running | None = None
        self._door: Door | None = None
        self._had_lease = False
        self._unanswered_looks = 0
        self._launcher_gone = False
        self._ends_with_lease = self.spec.ends_with_lease
        self._may_live_again = False

    def run(self) -> int:
        """Live the workspace's whole life. Returns the exit code: 0 unless it failed."""
        self._family = Family()
        teardown.become_subreaper()
        for number in (*END_SIGNALS, signal.SIGUSR1):
            signal.signal(number, lambda number, _: self._events.put(Signalled(number)))
        if self.spec.ends_with_lease and stat.S_ISFIFO(os.fstat(0).st_mode):
            threading.Thread(target=self._await_launcher, daemon=True).start()
        state: State = "ended"
        failure = None
        try:
            self._start()
            reason = self._watch()
        except EndedEarly as early:
            reason = str(early)
            self._may_live_again = self.spec.may_restart and not early.by_client
        except WorkspaceError as error:
            state, reason, failure = "failed", error.what, _as_failure(error)
            log.error("failed: %s", error)
        except OSError as error:
            state, reason = "failed", f"the node program failed: {error}"
            failure = Failure(
                kind="ContainerError", what=f"The workspace can't be started on {node_name()}.", evidence=str(error)
            )
            log.exception("failed")
        return self._end(state, reason, failure)

    def _start(self) -> None:
        self.directory.touch_heartbeat()
        bases = candidate_bases(os.environ)
        stale = leftovers.clear(leftovers.is_stale, bases, looks=1)
        for what in (*stale.ended, *stale.removed):
            log.info("cleared away what a dead workspace left: %s", what)
        base = choose_base(os.environ)
        self._scratch = Scratch(base, self._owner)
        log.info("scratch: %s (%.1f GB free, of %s)", self._scratch.path, free_bytes(base) / 1e9, _listed(bases))
        self._door = Door(
            workspace_id=self.spec.workspace_id,
            token=self._token,
            socket_path=self._scratch.door_socket,
            family=self._family,
            server=lambda: self._running.plan.address if self._running else None,
            events=self._events,
        )
        self._phases_s["prepare"] = self._started.elapsed_s
        given = Ingredients(
            scratch=self._scratch,
            token=self._token,
            environment=self.directory.read_environment(),
            runtime_environment=self.directory.read_runtime_environment(),
            tag=(
                leftovers.TAG_NAME,
                leftovers.tag_value(self.spec.workspace_id, self.spec.launch_id, self._owner),
            ),
        )
        self._startup = Startup(
            self.spec,
            given,
            self.directory,
            self._family,
            next_event=self._next_event,
            put_event=self._events.put,
        )
        self._running = self._startup.run()
        self._phases_s |= self._running.phases_s
        self._publish("ready")
        log.info("ready after %.2f s: %r, server pid %d", self._started.elapsed_s, self._door, self._child_pid)

    def _await_launcher(self) -> None:
        """The launcher holds the other end of stdin and never writes: the end of it is the end of the launcher."""
        while os.read(0, 4096):
            continue
        self._events.put(LauncherGone())

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
            if reason := self._reason_to_end(event):
                return reason
            if reason := self._abandoned(ready.elapsed_s):
                return reason

    def _reason_to_end(self, event: object | None) -> str:
        """Take note of an event. Returns why it is the end, in words; empty if it is not.

        Raises:
            ContainerError: the server died.
        """
        match event:
            case EndRequested():
                return "closed by its client"
            case Signalled(signal.SIGUSR1):
                self._announce_time_limit()
            case Superseded():
                self._may_live_again = True
                return "a later life of the job has taken over"
            case Signalled(number):
                left_s = self._time_left_s()
                at_limit = left_s is not None and left_s < _AT_LIMIT_S
                # Whether it is cancelled or requeued only Slurm knows; the time limit is an end for good.
                self._may_live_again = self.spec.may_restart and not at_limit
                return "the job's time limit" if at_limit else f"got {signal.Signals(number).name}"
            case ServerDied(child, returncode) if self._running is not None and child is self._running.child:
                # Slurm may signal all processes of a job at once, and the server's end be what is heard first.
                if self.spec.may_restart and isinstance(signalled := self._next_event(_SIGNAL_AFTER_S), Signalled):
                    return self._reason_to_end(signalled)
                raise server_death(self.directory, returncode)
            case DetachRequested():
                self._ends_with_lease = False
            case LauncherGone():
                self._launcher_gone = True
            case LeasesChanged(count):
                self._had_lease = self._had_lease or count > 0
        return ""

    def _announce_time_limit(self) -> None:
        """Slurm's warning that the time limit is near (sbatch --signal): said in the log and in the record."""
        left_s = self._time_left_s()
        said = f"the job's time limit is near{f': {left_s:.0f} s are left' if left_s is not None else ''}"
        log.warning("%s", said)
        if self._running is not None:
            self._running.notices.append(said)
            try:
                self._publish("ready")
            except WorkspaceError as error:
                log.warning("that can't be told: %s", error)

    def _time_left_s(self) -> float | None:
        """Seconds until the job's time limit, to the moment that passed between the job's start and ours."""
        # A workspace that only happens to run inside somebody's job does not know when that began.
        limit_s = None if self.spec.ends_with_lease else time_limit_s(os.environ)
        return None if limit_s is None else limit_s - self._started.elapsed_s

    def _may_idle(self) -> bool:
        return self._door is not None and self._door.leases == 0

    def _abandoned(self, ready_for_s: float) -> str:
        """Why there is nobody left to run for; empty while there is."""
        assert self._door is not None
        if self._door.leases:
            return ""
        if self._ends_with_lease:
            if self._had_lease or self._launcher_gone:
                return "its client is gone"
            return "its client never came" if ready_for_s > FIRST_LEASE_S else ""
        timeout_s = self.spec.idle_timeout_s
        if timeout_s is None or self._door.quiet_s < timeout_s or self._runs_a_command(timeout_s):
            return ""
        return f"idle for {timeout_s:g} s"

    def _idle_s(self) -> float:
        """For how long nobody has been connected and no command has run, as far as the server says."""
        quiet_s = self._door.quiet_s if self._door is not None else 0.0
        if quiet_s < 1.0 or self._running is None:
            return 0.0
        try:
            info = server.ask(self._running.plan.address, self._family, "/server_info")
        except (OSError, ValueError, NotOursError):
            return quiet_s
        if info.get("running_commands"):
            return 0.0
        idle_s = info.get("idle_time")
        return min(quiet_s, idle_s) if isinstance(idle_s, (int, float)) else quiet_s

    def _runs_a_command(self, timeout_s: float) -> bool:
        """Whether the server is at work for somebody who is not connected."""
        assert self._running is not None
        try:
            info = server.ask(self._running.plan.address, self._family, "/server_info")
        except (OSError, ValueError, NotOursError) as error:
            # It may be the very command that nobody is connected to that keeps it from answering.
            self._unanswered_looks += 1
            log.warning("the server does not say whether it is idle: %s", error)
            return self._unanswered_looks < _UNANSWERED_LOOKS_MAX
        self._unanswered_looks = 0
        idle_s = info.get("idle_time")
        return bool(info.get("running_commands")) or (isinstance(idle_s, (int, float)) and idle_s < timeout_s)

    def _beat(self) -> float:
        """Touch the heartbeat; returns when to do it next. A disk that is full or away for a while is survived."""
        teardown.reap_orphans(except_pid=self._child_pid)
        try:
            if self.spec.may_restart:
                self.directory.require_no_later_life(self._record("ready"))
            self.directory.touch_heartbeat(self._idle_s())
        except RendezvousStaleError as error:
            log.warning("%s", error)
            self._events.put(Superseded())
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
        child = self._startup.child if self._startup else None
        return child.pid if child else 0

    def _publish(self, state: State, reason: str | None = None, failure: Failure | None = None) -> None:
        self.directory.publish(self._record(state, reason, failure))

    def _record(self, state: State, reason: str | None = None, failure: Failure | None = None) -> Record:
        known: dict[str, Any] = {"time_left_s": self._time_left_s()}
        known |= {"phases_s": {name: round(seconds, 4) for name, seconds in self._phases_s.items()}}
        if self._door:
            known |= {"port": self._door.port, "socket": self._door.socket_path}
        if self._scratch:
            known |= {"node_scratch": str(self._scratch.path)}
        if self._running:
            plan = self._running.plan
            known |= {"runtime": plan.runtime, "working_dir": plan.working_dir, "extra_ports": plan.extra_ports}
            known |= {"notices": self._running.notices}
        return make_record(self.spec, self._owner, state=state, exit_reason=reason, failure=failure, **known)

    def _end(self, state: State, reason: str, failure: Failure | None) -> int:
        """Leave nothing behind, then say how it ended."""
        log.info("ending: %s", reason)
        if self._child_pid:
            teardown.terminate(self._child_pid, grace_s=self._running.plan.grace_s if self._running else 0.0)
        cleared = leftovers.clear(
            lambda owner: owner == self._owner,
            candidate_bases(os.environ),
            kin=lambda: procfs.descendants(os.getpid()),
            waited_for_pid=self._child_pid,
        )
        if cleared.left:
            log.error("left behind: %s", ", ".join(cleared.left))
            state, failure = "failed", left_behind(cleared.left, failure)
        try:
            self.directory.require_no_later_life(self._record(state))
            if not self._may_live_again:
                self.directory.forget_secrets()
            self._publish(state, reason, failure)
        except (WorkspaceError, OSError) as error:
            log.error("the record can't be written: %s", error)
        if self._door:
            self._door.close(reason if failure is None else failure.what)
        return 0 if state == "ended" else 1


def make_record(spec: Spec, owner: Owner, *, state: State, **known: Any) -> Record:
    """The record of a workspace on this node, with what is `known` of it beyond its spec, by `Record`'s names."""
    unknown: dict[str, Any] = {
        "port": 0,
        "socket": "",
        "runtime": spec.runtime,
        "working_dir": spec.working_dir,
        "mount_dir": spec.mount_dir,
        "node_scratch": "",
    }
    return Record(
        workspace_id=spec.workspace_id,
        launch_id=spec.launch_id,
        # One that was started on this machine, inside a job of somebody's own, is not that job.
        job_id=None if spec.ends_with_lease else os.environ.get("SLURM_JOB_ID"),
        restart_count=0 if spec.ends_with_lease else int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        may_restart=spec.may_restart,
        state=state,
        node=node_name(),
        python=sys.executable,
        package=str(Path(__file__).parents[2]),
        owner=str(owner),
        server=spec.server,
        started_at=clock.wall_s(),
        **(unknown | known),
    )


def time_limit_s(environment: Mapping[str, str]) -> float | None:
    """How long the job may run in all; None without a job, or where Slurm does not say (before 22.05).

    Source: sbatch(1) 24.11, OUTPUT ENVIRONMENT VARIABLES, SLURM_JOB_START_TIME and SLURM_JOB_END_TIME: seconds
    since the epoch, by the controller's clock. Only their difference is used: this node's clock may be another.
    """
    start, end = (environment.get(f"SLURM_JOB_{name}_TIME", "") for name in ("START", "END"))
    return float(end) - float(start) if start.isdigit() and end.isdigit() else None


def left_behind(left: list[str], before: Failure | None = None) -> Failure:
    """The failure of a workspace of which something could not be cleared away; `before` is one that it had already."""
    if len(left) > _LEFT_SAID_MAX:  # the log has all; a record that is too large is not believed
        left = [*left[:_LEFT_SAID_MAX], f"and {len(left) - _LEFT_SAID_MAX} more: see node.log"]
    return Failure(
        kind="ContainerError",
        what=f"{f'{before.what} And it' if before else f'The workspace on {node_name()}'} left something behind.",
        evidence="\n".join(([before.evidence] if before and before.evidence else []) + left),
        leftovers=left,
        remedy=f"On {node_name()}: hpc-workspace reap",
    )


def _as_failure(error: WorkspaceError) -> Failure:
    return Failure(kind=type(error).__name__, what=error.what, evidence=error.evidence, remedy=error.remedy)


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def node_name() -> str:
    """This node's name as Slurm and SSH know it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
