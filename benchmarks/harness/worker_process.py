"""The harness's end of a worker (`worker.py`): started by any interpreter, here or by SSH on another node."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_PROGRAM = str(Path(__file__).with_name("worker.py"))
_END_TIMEOUT_S = 30.0


class WorkerError(Exception):
    """A worker could not do what it was asked, or has ended."""


class WorkerProcess:
    """A worker that runs. It ends with its stdin.

    Args:
        argv: the interpreter, with what goes before it.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        # Its stderr is ours: what it says of its failure is seen.
        self._process = subprocess.Popen(
            [*argv, _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=None if env is None else dict(env),
        )

    def tell(self, do: str, **arguments: Any) -> None:
        """Ask for something; `answer` says what came of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"{do}: the worker has ended ({self._process.wait()})") from error

    def answer(self) -> dict[str, Any]:
        """What came of what was asked.

        Raises:
            WorkerError: it could not be done.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the worker has ended ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """`tell`, then `answer`."""
        self.tell(do, **arguments)
        return self.answer()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def here() -> WorkerProcess:
    """A worker in an interpreter like ours."""
    return WorkerProcess([sys.executable])


def on_node(node: str, python_path: str) -> WorkerProcess:
    """A worker in an interpreter like ours on another node, by SSH."""
    command = ["env", f"PYTHONPATH={python_path}", sys.executable]
    return WorkerProcess(["ssh", "-o", "BatchMode=yes", node, *map(shlex.quote, command)])
