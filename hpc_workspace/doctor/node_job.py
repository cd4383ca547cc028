"""A conversation with the doctor's other half, in a small job of its own: over the stdin and stdout of srun.

One job and one step: whatever is asked, nobody waits in the queue twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from hpc_workspace import clock, processes
from hpc_workspace.doctor.node_side import MARK
from hpc_workspace.errors import JobError, QueueTimeoutError
from hpc_workspace.launch import slurm_commands
from hpc_workspace.launch.slurm import NAME_INTERPRETER, is_without_interpreter
from hpc_workspace.launch.transfer import exported_names
from hpc_workspace.options import SlurmOptions

_TIME_MIN = 10
_CPUS = 1
_LOOK_S = 0.5
_END_TIMEOUT_S = 30.0
_TAIL_LINES = 6
# What a workspace's job is charged to and where it may run; the rest of a job's options are not a small job's.
_PLACES = ("constraint", "nodelist", "exclude")


def build_argv(options: SlurmOptions) -> list[str]:
    """The argv of the job, by the options that a workspace's would have; its `setup` lines come first there too."""
    python = options.python or sys.executable
    command = [python, "-m", "hpc_workspace.doctor"]
    if options.setup:
        lines = "\n".join(options.setup)
        command = ["/bin/bash", "-c", f'{{\n{lines}\n}} < /dev/null\nexec -- "$@"', "bash", *command]
    return slurm_commands.build_srun_argv(
        name="hpcws-doctor",
        partition=options.partition,
        cpus=_CPUS,
        exported=exported_names("HPC_WORKSPACE_"),
        slurm=options,
        command=command,
        takes_stdin=True,
        more=[
            f"--time={_TIME_MIN}",
            *(f"--{name}={value}" for name in _PLACES if (value := getattr(options, name)) is not None),
        ],
    )


class NodeJob:
    """The other half, once it has said who it is.

    Args:
        options: of the job.
        queue_timeout_s: how long it may wait for its start.
        say: told each line that srun prints.

    Attributes:
        node: short name of the node it runs on.
        job_id, partition: Slurm's.
        version: of this package there.
        start_s: how long it took from the call to the first word.

    Raises:
        QueueTimeoutError: it did not start in time; it was withdrawn.
        JobError: it did not come up; `evidence` has the last lines.
        PrerequisiteError: there is no srun.
    """

    def __init__(self, options: SlurmOptions, *, queue_timeout_s: float, say: Callable[[str], None]) -> None:
        self._python = options.python or sys.executable
        self._say = say
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed with the job
        self._said = b""
        self._buffer = b""
        self._socket, theirs = socket.socketpair()
        began = clock.Deadline(queue_timeout_s)
        try:
            with theirs:
                self._child = processes.spawn(
                    build_argv(options),
                    output=self._log,
                    stdio=theirs.fileno(),
                    env=slurm_commands.strip_environment(os.environ),
                )
        except BaseException:
            self._socket.close()
            self._log.close()
            raise
        try:
            hello = self._answer(began)
        except BaseException:
            self.close()
            raise
        self.start_s = began.elapsed_s
        self.node, self.version = str(hello["node"]), str(hello["version"])
        self.job_id, self.partition = str(hello["job_id"]), str(hello["partition"])

    def ask(self, question: str, *, patience_s: float, **fields: Any) -> dict[str, Any]:
        """The answer to a question; `node_side.NodeSide` has them all.

        Raises:
            JobError: there was none, or it was an error.
        """
        try:
            self._socket.sendall(json.dumps({"question": question, **fields}).encode() + b"\n")
        except OSError as error:
            raise self._ended() from error
        answer = self._answer(clock.Deadline(patience_s))
        if "error" in answer:
            raise JobError(
                f"The node could not answer ({question}).", job_id=self.job_id, node=self.node, evidence=answer["error"]
            )
        return answer

    def close(self) -> None:
        """End the job in order, or at once if it does not end."""
        with contextlib.suppress(OSError):  # srun may be gone already
            self._socket.shutdown(socket.SHUT_WR)
        if self._child.wait(_END_TIMEOUT_S) is None:
            self._child.send_signal(signal.SIGTERM)
            self._child.wait(_END_TIMEOUT_S)
        self._socket.close()
        self._log.close()

    def _answer(self, deadline: clock.Deadline) -> dict[str, Any]:
        while True:
            while b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                text = line.decode("utf-8", "replace")
                if text.startswith(MARK):
                    return dict(json.loads(text.removeprefix(MARK)))
            self._pass_on()
            if deadline.is_over:
                self._child.send_signal(signal.SIGTERM)
                raise QueueTimeoutError(
                    f"The doctor's job gave no answer within {deadline.timeout_s:g} s.", evidence=self._tail()
                )
            self._socket.settimeout(min(_LOOK_S, max(0.01, deadline.left_s)))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise self._ended() from error
            if not data:
                raise self._ended()
            self._buffer += data

    def _pass_on(self) -> None:
        """Tell what srun has printed since the last time."""
        for line in self._read_log().splitlines():
            self._say("".join(c for c in line if c.isprintable()))

    def _read_log(self) -> str:
        # srun writes through an offset that we share with it: look without moving it.
        size = os.fstat(self._log.fileno()).st_size
        new = os.pread(self._log.fileno(), size - len(self._said), len(self._said))
        self._said += new
        return new.decode("utf-8", "replace")

    def _tail(self) -> str:
        self._read_log()
        lines = [
            "".join(c for c in line if c.isprintable()) for line in self._said.decode("utf-8", "replace").splitlines()
        ]
        return "\n".join([line for line in lines if line.strip()][-_TAIL_LINES:])

    def _ended(self) -> JobError:
        """Why there is no answer any more."""
        code = self._child.wait(_END_TIMEOUT_S)
        tail = self._tail()
        if is_without_interpreter(tail, self._python):
            return JobError(f"{self._python} can't run hpc_workspace there.", evidence=tail, remedy=NAME_INTERPRETER)
        return JobError(
            f"srun ended with exit code {code}.", evidence=pick_line(tail), remedy=find_remedy(tail) or _ASK_SINFO
        )


def pick_line(said: str) -> str:
    """The line of what srun said that has the reason: its first error, else the last; empty if it said nothing."""
    lines = said.strip().splitlines()
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "")


def find_remedy(said: str) -> str:
    """What to do about what srun said; empty where nothing is known."""
    return next((remedy for sign, remedy in _REMEDIES if sign.lower() in said.lower()), "")


_ASK_SINFO = "`sinfo -s` lists the partitions, `sinfo -R` the nodes that are out of order."
# Messages of Slurm 24.11, errno.c; the first made to appear by a node whose munge was stopped.
_REMEDIES = (
    (
        "Zero Bytes were transmitted",
        "The node did not take it: its munge or clock, most likely. Tell the administrators, or try another one.",
    ),
    ("authentication error", "Munge is silent, here or there, or a clock is off: tell the administrators."),
    ("Unable to contact slurm controller", "Try `scontrol ping`."),
    ("Invalid partition", "`sinfo -s` lists the partitions; without one named, Slurm's default counts."),
    ("Invalid account", "Set slurm.account: `sacctmgr show assoc user=$USER` lists yours."),
    ("Invalid qos", "Set slurm.qos: `sacctmgr show assoc user=$USER format=qos` lists yours."),
    ("node configuration is not available", "No node there has what is asked for: see [slurm] of your settings."),
)
