"""The routes through one command on the node, for sites that forbid SSH to nodes, or whose sshd forbids forwarding.

One `srun` step, or one `ssh NODE COMMAND`, runs the bridge (`hpc_workspace.node.bridge`) on the node, and carries every
stream of every workspace that this process has there. It ends with this process, however that ends: with us its stdin
ends. One that died is started anew by the next stream.

Source: srun(1) of Slurm 24.11; ssh(1) and ssh_config(5), OpenSSH 10.0.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Mapping

from hpc_workspace import processes
from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import TunnelError, TunnelLostError
from hpc_workspace.launch.slurm_commands import strip_environment
from hpc_workspace.mux.frames import MuxError, printable
from hpc_workspace.mux.streams import Mux, MuxStream, StreamRefusedError
from hpc_workspace.record import Record

log = logging.getLogger(__name__)

# A controller that is busy lets srun wait; ssh has its own, shorter.
_START_TIMEOUT_S = 45.0
_SSH_TIMEOUT_S = 20
_OPEN_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 5.0
_LAST_WORDS_S = 2.0
_SAID_MAX_BYTES = 4096

# -I and -S: nothing of the user's environment or site has a say in it, and it starts twice as fast.
_START_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); from hpc_workspace.node.bridge import run_and_exit; run_and_exit()"
)


def build_bridge_argv(python: str, package: str) -> list[str]:
    """The argv that runs the bridge on the node.

    Args:
        python: the node program's interpreter.
        package: the directory that it has this package in.
    """
    return [python, "-I", "-S", "-c", _START_CODE, package]


def build_srun_argv(job_id: str, node: str, command: list[str]) -> list[str]:
    """The argv that runs `command` in a step of its own, beside whatever else runs in the job."""
    return [
        "srun",
        f"--jobid={job_id}",
        f"--nodelist={node}",
        "--nodes=1",
        "--ntasks=1",
        # Shares all that the job has with the batch script, which has all of it.
        "--overlap",
        "--mem=0",
        "--gres=none",
        "--cpu-bind=none",
        "--mpi=none",
        "--unbuffered",
        "--quiet",
        # This directory may not be there; nor are our limits and our environment the node's.
        "--chdir=/",
        "--propagate=NONE",
        "--export=NIL",
        *command,
    ]


def build_ssh_argv(node: str, command: list[str]) -> list[str]:
    """The argv that runs `command` on `node` by a connection of its own."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": str(_SSH_TIMEOUT_S),
        # Not a connection that somebody else may close, and none of what a person's configuration adds to a login.
        "ControlMaster": "no",
        "ControlPath": "none",
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "PermitLocalCommand": "no",
        "RemoteCommand": "none",
        "RequestTTY": "no",
        "StdinNull": "no",
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["ssh", *flags, "--", node, shlex.join(command)]


class _Carrier:
    """One srun or ssh that runs, and the multiplexer on its stdin and stdout.

    Raises:
        PrerequisiteError: there is no such program.
    """

    def __init__(self, argv: list[str], env: Mapping[str, str] | None) -> None:
        self._said = b""
        ours, theirs = socket.socketpair()
        self._said_fd, said_fd = os.pipe()
        try:
            with ours, theirs, open(said_fd, "wb") as output:
                self._child = processes.spawn(argv, output=output, env=env, stdio=theirs.fileno())
                fd = ours.detach()
        except BaseException:
            os.close(self._said_fd)
            raise
        self._listener = threading.Thread(target=self._listen, name="hpc-workspace-mux-stderr", daemon=True)
        self._listener.start()
        self.mux = Mux(fd, fd, on_end=self._reap)

    def said(self) -> str:
        """The last that it printed on stderr; waits a moment for what a program that has ended had still to say."""
        if self.mux.error is not None:
            self._listener.join(_LAST_WORDS_S)
        return printable(self._said)

    def _listen(self) -> None:
        while piece := os.read(self._said_fd, _SAID_MAX_BYTES):
            self._said = (self._said + piece)[-_SAID_MAX_BYTES:]
        os.close(self._said_fd)

    def _reap(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._child.wait(_END_TIMEOUT_S) is not None:
                return
            self._child.send_signal(number)
        self._child.wait(_END_TIMEOUT_S)

    def forget_after_fork(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._said_fd)
        self.mux.forget_after_fork()


class _Shared:
    """The one carrier of this process to one node, used by every workspace there."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.carrier: _Carrier | None = None
        self.users = 0


_shared: dict[tuple[str, str], _Shared] = {}
_shared_lock = threading.Lock()


def _forget_after_fork() -> None:
    """The parent's carriers are not the child's, and must not live on because the child holds their pipes."""
    global _shared_lock
    _shared_lock = threading.Lock()
    for shared in _shared.values():
        if shared.carrier is not None:
            shared.carrier.forget_after_fork()
        shared.carrier = None
        shared.lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


class _BridgeRoute:
    """What the two routes have in common.

    Args:
        name: the route's.
        program: what carries it.
        build_argv: gives the argv that runs a command on the node by it.
        env: the environment for that; None: this process's.
    """

    def __init__(
        self,
        record: Record,
        *,
        name: str,
        program: str,
        build_argv: Callable[[list[str]], list[str]],
        env: Mapping[str, str] | None = None,
    ) -> None:
        if processes.find_program(program) is None:
            raise TunnelError(f"There is no {program} on PATH.", node=record.node)
        if not record.python:
            raise TunnelError(
                f"Workspace {record.workspace_id} does not say which Python its node has.",
                node=record.node,
                remedy="It was started by an earlier version of hpc-workspace: start a new one.",
            )
        self.name = name
        self._record = record
        self._program = program
        self._build_argv = build_argv
        self._env = env
        self._targets = [f"unix:{record.socket}", f"tcp:{record.port}"]
        self._streams: weakref.WeakSet[MuxStream] = weakref.WeakSet()
        self._closed = False
        with _shared_lock:
            self._shared = _shared.setdefault((name, record.node), _Shared())
            self._shared.users += 1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self._record.node}{' [closed]' if self._closed else ''}>"

    def open(self) -> Stream:
        """A stream to the door's Unix socket, or to its port where the bridge can't reach that.

        Raises:
            TunnelLostError: the bridge died meanwhile.
            TunnelError: it can't be started, or reaches neither; this route is closed.
        """
        for may_retry in (True, False):
            carrier = self._running_carrier()
            try:
                return self._open(carrier.mux)
            except OSError as error:
                if isinstance(error, TunnelError):
                    raise
                if may_retry and isinstance(error, MuxError):
                    continue  # one that was ending when it was found
                raise TunnelLostError(
                    f"The bridge on {self._record.node} (by {self._program}) broke.",
                    node=self._record.node,
                    evidence=_joined(str(error), carrier.said()),
                ) from error
        raise AssertionError("the second time raises or returns")

    def _open(self, mux: Mux) -> MuxStream:
        refusals = []
        for target in list(self._targets):
            try:
                stream = mux.open(target, _OPEN_TIMEOUT_S)
            except StreamRefusedError as refusal:
                refusals.append(str(refusal))
            else:
                self._targets.sort(key=lambda known: known != target)  # the next stream tries this one first
                with _shared_lock:
                    self._streams.add(stream)
                return stream
        raise TunnelError(
            f"Nobody listens at the door's address on {self._record.node}.",
            node=self._record.node,
            evidence="; ".join(refusals),
            remedy="The workspace has probably ended: see exit_reason in its record.json.",
        )

    def close(self) -> None:
        with _shared_lock:
            if self._closed:
                return
            self._closed = True
            self._shared.users -= 1
            carrier, is_last = self._shared.carrier, self._shared.users == 0
            if is_last:
                self._shared.carrier = None
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        if is_last and carrier is not None:
            carrier.mux.close()

    def _running_carrier(self) -> _Carrier:
        """The one that there is, or a new one by way of this route's own workspace."""
        with self._shared.lock:
            carrier = self._shared.carrier
            if not self._closed and (carrier is None or carrier.mux.error is not None):
                carrier = self._start()
                with _shared_lock:
                    self._shared.carrier = carrier if self._shared.users else None
                if self._shared.carrier is None:  # closed while it started
                    carrier.mux.close()
            if self._closed or carrier is None:
                raise TunnelError(f"The route to {self._record.node} is closed.", node=self._record.node)
            return carrier

    def _start(self) -> _Carrier:
        record = self._record
        carrier = _Carrier(self._build_argv(build_bridge_argv(record.python, record.package)), self._env)
        try:
            carrier.mux.wait_greeted(_START_TIMEOUT_S)
        except MuxError as error:
            carrier.mux.close()
            raise TunnelError(
                f"The bridge did not start on {record.node} (by {self._program}).",
                node=record.node,
                evidence=_joined(str(error), carrier.said()),
                remedy=f"Try: {shlex.join(self._build_argv([record.python, '-V']))}",
            ) from error
        log.debug("a bridge to %s by %s", record.node, self._program)
        return carrier


class SrunRoute(_BridgeRoute):
    """Streams over a step of the workspace's own job."""

    name = "srun"

    def __init__(self, record: Record) -> None:
        job_id = record.job_id
        if job_id is None:
            raise TunnelError(f"Workspace {record.workspace_id} is in no Slurm job.", node=record.node)
        super().__init__(
            record,
            name=self.name,
            program="srun",
            build_argv=lambda command: build_srun_argv(job_id, record.node, command),
            env=strip_environment(os.environ),
        )


class SshCommandRoute(_BridgeRoute):
    """Streams over one `ssh` that runs a command and forwards nothing."""

    name = "ssh-command"

    def __init__(self, record: Record) -> None:
        super().__init__(
            record,
            name=self.name,
            program="ssh",
            build_argv=lambda command: build_ssh_argv(record.node, command),
        )


def _joined(error: str, said: str) -> str:
    return f"{error}\nIt printed: {said}" if said else error
