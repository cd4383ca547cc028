"""Other programs: the only module that uses `subprocess`. Every argv is a list; nothing goes through a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from hpc_workspace.errors import PrerequisiteError


@dataclass(frozen=True)
class Completed:
    """A program that has ended: its return code (-N: ended by signal N) and all it printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """What it said of its failure: stderr, or stdout where that is empty."""
        return (self.stderr.strip() or self.stdout.strip())[-4000:]


class ProgramTimeoutError(Exception):
    """A program that did not end in time; it was killed. Callers map it to an error that says what that means."""

    def __init__(self, program: str, timeout_s: float) -> None:
        self.program = program
        self.timeout_s = timeout_s
        super().__init__(f"{program} did not answer within {timeout_s:g} s")


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    input: bytes | None = None,
) -> Completed:
    """Run a program to its end.

    Args:
        env: the whole environment; None: this process's.
        input: bytes for its stdin; None: an empty one.

    Raises:
        PrerequisiteError: the program is not on PATH.
        ProgramTimeoutError: it took longer than `timeout_s`; it is dead.
    """
    try:
        ended = subprocess.run(
            list(argv),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=timeout_s,
            env=env,
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError as error:
        raise PrerequisiteError(
            f"{argv[0]} is not available.", remedy=f"Install {argv[0]}, or put it on PATH (module load ...?)."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ProgramTimeoutError(argv[0], timeout_s) from error
    return Completed(ended.returncode, _text(ended.stdout), _text(ended.stderr))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


class Child:
    """A program that runs beside us, in a session of its own, so that a Ctrl-C meant for us does not reach it.

    One that was started with a lifeline reads the end of its stdin when this object, or this process, is gone.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        _children.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    def returncode(self) -> int | None:
        """Its return code, or None while it runs. Reaps it."""
        returncode = self._process.poll()
        if returncode is not None:
            self.drop_lifeline()
        return returncode

    def wait(self, timeout_s: float) -> int | None:
        """Its return code, or None if it still runs after `timeout_s`."""
        try:
            returncode = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self.drop_lifeline()
        return returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing happens if it has ended."""
        self._process.send_signal(number)

    def drop_lifeline(self) -> None:
        """Let go of the pipe that stands for us, if there is one. One that still runs takes it for our end."""
        if self._process.stdin is not None:
            self._process.stdin.close()


_children: weakref.WeakSet[Child] = weakref.WeakSet()


def _drop_lifelines() -> None:
    """A forked process is not the one that a lifeline stands for."""
    for child in list(_children):
        child.drop_lifeline()


os.register_at_fork(after_in_child=_drop_lifelines)


def spawn(
    argv: Sequence[str],
    *,
    output: IO[bytes] | int,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdio: int | None = None,
    lifeline: bool = False,
) -> Child:
    """Start a program that outlives this call.

    Args:
        output: where its stdout and stderr go.
        stdio: a socket's descriptor to be both its stdin and its stdout (stderr still goes to `output`).
        lifeline: whether its stdin is a pipe that nothing is ever written to, open for as long as we live.

    Raises:
        PrerequisiteError: the program is not on PATH.
    """
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=stdio if stdio is not None else subprocess.PIPE if lifeline else subprocess.DEVNULL,
            stdout=output if stdio is None else stdio,
            stderr=output,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise PrerequisiteError(f"{argv[0]} is not available.", remedy=f"Install {argv[0]}.") from error
    return Child(process)


def find_program(name: str, *, of_system: bool = False) -> str | None:
    """Where `name` is on PATH, or with `of_system` where the system has its programs if not; None if it is nowhere."""
    return shutil.which(name) or (shutil.which(name, path=os.defpath) if of_system else None)
