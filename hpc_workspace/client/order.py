"""What is to be run, and what both kinds of server need for it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from hpc_workspace.errors import CommandError, ServerResponseError, UnknownCommandError

# How long a server may say nothing after the time that a command has: it ends what runs, and collects the output.
GRACE_S = 15.0
# So much of each stream is told at a time, as the bundled server does.
OUTPUT_BYTES = 8 * 1024 * 1024

_UNPROCESSABLE, _NOT_FOUND, _GONE = 422, 404, 410


@dataclass(frozen=True)
class Order:
    """One command to be run.

    Attributes:
        cwd: absolute, as the workspace sees it.
        timeout_s: None: it may run for ever.
        id: ours, by which it is found again.
    """

    command: str
    cwd: str
    timeout_s: float | None
    env: dict[str, str] = field(repr=False)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def answer_timeout_s(self) -> float | None:
        """How long the server may say nothing."""
        return None if self.timeout_s is None else self.timeout_s + GRACE_S


@contextlib.contextmanager
def start_errors(command: str) -> Iterator[None]:
    """A server's "this can't be done" (422) to a command, as the error that says so."""
    try:
        yield
    except ServerResponseError as error:
        if error.status != _UNPROCESSABLE:
            raise
        raise not_started(command, error.evidence) from error


def not_started(command: str, evidence: str) -> CommandError:
    """The error of a command that could not be started."""
    return CommandError("The command could not be started.", command=command, evidence=evidence)


@contextlib.contextmanager
def unknown_errors(command_id: str) -> Iterator[None]:
    """A server's "there is none" (404, 410) or "that is no id" (422), as the error that says so."""
    try:
        yield
    except ServerResponseError as error:
        if error.status not in (_NOT_FOUND, _GONE, _UNPROCESSABLE):
            raise
        raise unknown_command(command_id, error.evidence) from error


def unknown_command(command_id: str, evidence: str = "") -> UnknownCommandError:
    """The error of an id that the agent server does not know."""
    return UnknownCommandError(
        f"The agent server knows no command {command_id!r}.",
        command_id=command_id,
        evidence=evidence,
        remedy="It knows those that start_command gave for this workspace since it began (a restart of its job is a "
        "new beginning), and of the ended ones the last.",
    )
