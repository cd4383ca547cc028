"""From a plan to a server that answers: gates, attempts, and what is tried where a machine can't do what was asked."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpc_workspace import apptainer, clock, locks, processes, procfs, teardown
from hpc_workspace.errors import ContainerError, RendezvousError, ServerNotReadyError
from hpc_workspace.node import limits, server
from hpc_workspace.node.events import ServerDied, require_no_end
from hpc_workspace.node.gates import Gate, gates_for
from hpc_workspace.node.identity import Family, NotOursError
from hpc_workspace.node.plan import Ingredients, Plan, make_plan, verify_signature
from hpc_workspace.node.server import Address
from hpc_workspace.record import Spec
from hpc_workspace.rendezvous import WorkspaceDirectory

log = logging.getLogger(__name__)

_READY_PROBE_S = 0.01
_GATE_PROBE_S = 0.05
# A gate is good manners, not a right: whoever holds it so long is stuck, and no reason to wait longer.
_GATE_MAX_S = 600.0
_STARTS_OF_AN_IMAGE = 2  # about 1 start in 28 of OpenHands' server dies in an import deadlock (1.58)


@dataclass
class Running:
    """A server that answers.

    Attributes:
        notices: what is not as it was asked for, with the reason.
        phases_s: how long the gate and the server took.
    """

    plan: Plan
    child: processes.Child
    notices: list[str] = field(default_factory=list)
    phases_s: dict[str, float] = field(default_factory=dict)


class Startup:
    """Starts one workspace's server.

    Args:
        next_event: waits so many seconds for the node program's next event.
        put_event: hands it one.
    """

    def __init__(
        self,
        spec: Spec,
        given: Ingredients,
        directory: WorkspaceDirectory,
        family: Family,
        *,
        next_event: Callable[[float], object | None],
        put_event: Callable[[object], None],
    ) -> None:
        self._spec = spec
        self._given = given
        self._directory = directory
        self._family = family
        self._next_event = next_event
        self._put_event = put_event
        self._notices: list[str] = []
        self.child: processes.Child | None = None

    def run(self) -> Running:
        """Pass the gates, start the server and wait until it answers.

        Raises:
            EndedEarly: somebody asked for the end.
            ImageError, PrerequisiteError, ContainerError: it can't be run here, or died.
            ServerNotReadyError: it did not answer in time.
        """
        verify_signature(self._spec)
        gates = gates_for(str(self._spec.image)) if self._spec.image else []
        began_s = clock.now_s()
        try:
            self._pass(gates)
            passed_s = clock.now_s()
            running = self._climb(self._spec)
        finally:
            for gate in gates:
                gate.release()
        running.phases_s = {"gate": passed_s - began_s, "server": clock.now_s() - passed_s}
        return running

    def _pass(self, gates: list[Gate]) -> None:
        patience = clock.Deadline(_GATE_MAX_S)
        for gate in gates:
            while not gate.try_acquire():
                if patience.is_over:
                    log.warning("%r was shut for %g s: starting all the same", gate, _GATE_MAX_S)
                    return
                require_no_end(self._next_event(_GATE_PROBE_S))

    def _climb(self, spec: Spec) -> Running:
        """Try until it works, there is nothing else to try, or it is not the machine's fault."""
        tries_left = _STARTS_OF_AN_IMAGE if spec.server == "image" else 1
        while True:
            log_start = self._log_size()
            try:
                return self._attempt(spec)
            except ContainerError as error:
                self._clear_attempt()
                fallback = find_fallback(spec, self._log_since(log_start))
                if fallback is not None:
                    spec, notice = fallback
                    self._notice(notice)
                elif tries_left > 1:
                    tries_left -= 1
                    log.warning("the server died at its start, trying once more: %s", error.what)
                else:
                    raise

    def _attempt(self, spec: Spec) -> Running:
        plan = make_plan(spec, self._given)
        child = self._spawn(plan)
        self._wait_answers(plan, child)
        if spec.max_processes is not None:
            limits.limit_processes(lambda: _processes_inside(child), spec.max_processes)
        if spec.use_fakeroot and _has_one_user(_processes_inside(child)):
            self._notice(_ONE_USER)
        if plan.writable == "tmpfs":
            self._notice(_describe_tmpfs(child))
        return Running(replace(plan, address=self._out_of_reach(plan.address)), child, self._notices)

    def _notice(self, text: str) -> None:
        self._notices.append(text)
        log.warning("%s", text)

    def _spawn(self, plan: Plan) -> processes.Child:
        with self._directory.server_log.open("ab") as output:
            child = processes.spawn(plan.argv, output=output, env=plan.environment, cwd=plan.cwd)
        self.child = child
        threading.Thread(target=self._await_death, args=(child,), daemon=True).start()
        return child

    def _await_death(self, child: processes.Child) -> None:
        while (returncode := child.wait(3600)) is None:
            continue
        self._put_event(ServerDied(child, returncode))

    def _wait_answers(self, plan: Plan, child: processes.Child) -> None:
        """The time that a start may take begins here, at the spawn, and not at the gate."""
        deadline = clock.Deadline(self._spec.health_check_timeout_s)
        locks.load()
        while not self._answers(plan.address):
            event = self._next_event(_READY_PROBE_S)
            if isinstance(event, ServerDied) and event.child is child:
                raise server_death(self._directory, event.returncode)
            require_no_end(event)
            if deadline.is_over:
                raise ServerNotReadyError(
                    f"The agent server on {os.uname().nodename} did not answer within "
                    f"{self._spec.health_check_timeout_s:g} s of its start.",
                    evidence=server_tail(self._directory),
                    remedy="Raise health_check_timeout if the machine is slow.",
                )

    def _answers(self, address: Address) -> bool:
        try:
            server.ask(address, self._family, "/health")
        except (OSError, ValueError, NotOursError) as error:
            log.debug("not ready: %s", error)
            return False
        return True

    def _out_of_reach(self, address: Address) -> Address:
        """The server's socket under a second name that the container can't remove."""
        if address.socket_path is None:
            return address
        kept = self._given.scratch.kept_server_socket
        try:
            os.link(address.socket_path, kept)
        except OSError as error:
            log.warning("the server's socket has no second name, the container can remove it: %s", error)
            return address
        return Address(socket_path=str(kept))

    def _clear_attempt(self) -> None:
        """Leave nothing of a failed attempt in the way of the next."""
        child = self.child
        self.child = None
        teardown.end_all(lambda: procfs.descendants(os.getpid()), waited_for_pid=child.pid if child is not None else 0)
        self._given.scratch.new_overlay()

    def _log_size(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self._directory.server_log.stat().st_size
        return 0

    def _log_since(self, offset: int) -> str:
        with contextlib.suppress(FileNotFoundError), self._directory.server_log.open("rb") as file:
            file.seek(offset)
            return file.read(64 * 1024).decode("utf-8", "replace")
        return ""


def find_fallback(spec: Spec, said: str) -> tuple[Spec, str] | None:
    """What to try instead of `spec` after a start that failed with `said`, and the reason in words.

    None if it does not look like something that this machine can't do.
    """
    cause = apptainer.find_cause(said)
    if cause is None:
        return None
    if cause.option == "use_fakeroot" and spec.use_fakeroot:
        without = spec.model_copy(update={"use_fakeroot": False})
        return without, f"use_fakeroot: not possible here, going on without it (you are yourself inside): {cause.said}"
    if cause.option == "writable" and spec.writable in _NEXT_WRITABLE:
        weaker = _NEXT_WRITABLE[spec.writable]
        said = f"writable: {spec.writable!r} is not possible here, going on with {weaker!r}: {cause.said}"
        return spec.model_copy(update={"writable": weaker}), said
    return None


_NEXT_WRITABLE = {"overlay": "tmpfs", "tmpfs": "none"}


def _processes_inside(child: processes.Child) -> list[procfs.Process]:
    """The processes of the container: those of the server's that are in another PID namespace than this one."""
    return [process for process in procfs.descendants(child.pid) if procfs.is_elsewhere(process.pid, "pid")]


_ONE_USER = (
    "use_fakeroot: you have no lines in /etc/subuid and /etc/subgid here, so that you are root inside, but can't give "
    "files to anybody else"
)


def _has_one_user(inside: list[procfs.Process]) -> bool:
    """Whether the container's user namespace maps one id alone; user_namespaces(7), uid_map: inside, outside, count."""
    if not inside:
        return False
    with contextlib.suppress(OSError):
        counts = Path(f"/proc/{inside[0].pid}/uid_map").read_text().split()[2::3]
        return counts == ["1"]
    return False


def _describe_tmpfs(child: processes.Child) -> str:
    """How much room the container's root has: that of the tmpfs which the runtime keeps beside it.

    Asked of that and not of the root, a FUSE file system that answers its own user namespace alone. Source: mountinfo
    of the starter of Apptainer 1.4.5.
    """
    size = "its size is not known"
    for point, kind in procfs.mounts_of(child.pid):
        if kind == "tmpfs" and point.endswith("/mnt/session/tmpfs"):
            with contextlib.suppress(OSError):
                found = os.statvfs(f"/proc/{child.pid}/root{point}")
                size = f"at most {found.f_frsize * found.f_blocks // 2**20} MiB"
    return f"writable='tmpfs': what is written outside /tmp and /workspace is in memory, {size}"


def server_death(directory: WorkspaceDirectory, returncode: int) -> ContainerError:
    """The error of a server that ended by itself, with what it said last."""
    how = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
    tail = directory.log_tail(directory.server_log)
    cause = apptainer.find_cause(tail)
    return ContainerError(
        f"The agent server on {os.uname().nodename} ended with {how}.",
        evidence=server_tail(directory),
        remedy=cause.remedy if cause else "",
    )


def server_tail(directory: WorkspaceDirectory) -> str:
    tail = directory.log_tail(directory.server_log)
    with contextlib.suppress(RendezvousError):
        tail = tail.replace(directory.read_token(), "(the key)")
    return f"Last lines of {directory.server_log}:\n{tail}" if tail else "It printed nothing."
