"""What a command or a transfer gives back: values with the field names of OpenHands' workspaces."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Output(BaseModel):
    """What a command printed: text, and the bytes that it stands for."""

    model_config = ConfigDict(frozen=True)

    stdout: str = ""
    stderr: str = ""
    stdout_file: str | None = None
    stderr_file: str | None = None
    timeout_occurred: bool = False
    truncated: bool = False

    @property
    def stdout_bytes(self) -> bytes:
        """`stdout`, exact to the byte."""
        return self.stdout.encode("utf-8", "surrogateescape")

    @property
    def stderr_bytes(self) -> bytes:
        """`stderr`, exact to the byte."""
        return self.stderr.encode("utf-8", "surrogateescape")


class CommandResult(_Output):
    """How a command ended.

    Attributes:
        command: the text that was run.
        exit_code: the shell's; -N when signal N ended it; -1 with `timeout_occurred` when its time ran out.
        stdout, stderr: text; bytes that are not UTF-8 are kept as lone surrogates (`surrogateescape`);
            `stdout_bytes` and `stderr_bytes` give the bytes back.
        timeout_occurred: whether the time ran out; what was printed until then is kept.
        truncated: whether `stdout` or `stderr` is only the beginning, 8 MiB, of what was printed.
        stdout_file, stderr_file: a file of the workspace with all of it, for `file_download`; None where the text is
            whole, or where the node's disk had no room.
    """

    command: str
    exit_code: int


class CommandOutput(_Output):
    """A started command, as it is now: what it has printed, and how it ended if it has.

    Attributes:
        command_id: as `start_command` gave it.
        exit_code: None while it runs; else as a `CommandResult`'s.
        stdout, stderr: as a `CommandResult`'s, from where it was asked for. While it runs, a character of which a part
            is still to come is left for the next time.
        timeout_occurred: whether its time ran out.
        truncated: whether there was more than the 8 MiB of each that are told at a time: the next 8 MiB are told by
            `get_command_output(…, since=this)`, all of it is in the files.
        stdout_file, stderr_file: as a `CommandResult`'s.
        stdout_from, stderr_from: how many bytes were before `stdout` and `stderr`.
    """

    command_id: str
    exit_code: int | None = None
    stdout_from: int = 0
    stderr_from: int = 0

    @property
    def is_running(self) -> bool:
        """Whether it had not ended."""
        return self.exit_code is None

    @property
    def stdout_end(self) -> int:
        """How many bytes of stdout are told by now, this included."""
        return self.stdout_from + len(self.stdout_bytes)

    @property
    def stderr_end(self) -> int:
        """As `stdout_end`."""
        return self.stderr_from + len(self.stderr_bytes)


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
