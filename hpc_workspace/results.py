"""What a command or a transfer gives back: values with the field names of OpenHands' workspaces."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class CommandResult(BaseModel):
    """How a command ended.

    Attributes:
        command: the text that was run.
        exit_code: the shell's; -N when signal N ended it; -1 with `timeout_occurred` when its time ran out.
        stdout, stderr: text; bytes that are not UTF-8 are kept as lone surrogates (`surrogateescape`), so that
            `.encode("utf-8", "surrogateescape")` gives the bytes back. OpenHands' server has replaced them already.
        timeout_occurred: whether the time ran out; what was printed until then is kept.
        truncated: whether the middle of the output was left out of `stdout` or `stderr`.
    """

    model_config = ConfigDict(frozen=True)

    command: str
    exit_code: int
    stdout: str = ""
    stderr: str = ""
    timeout_occurred: bool = False
    truncated: bool = False


class OutputChunk(BaseModel):
    """A piece of a running command's output, in the order in which it came. `stream` is stdout or stderr."""

    model_config = ConfigDict(frozen=True)

    stream: str
    data: bytes


class FileOperationResult(BaseModel):
    """A finished transfer: both paths and the number of bytes. A failed one is an exception, not a value."""

    model_config = ConfigDict(frozen=True)

    success: bool = True
    source_path: str
    destination_path: str
    file_size: int
    error: str | None = None


class GitChange(BaseModel):
    """One changed file of a repository. `status` is MOVED, ADDED, DELETED or UPDATED."""

    model_config = ConfigDict(frozen=True)

    status: str
    path: str


class GitDiff(BaseModel):
    """One file before and after; None where it did not or does not exist."""

    model_config = ConfigDict(frozen=True)

    modified: str | None
    original: str | None
