"""Commands of a workspace, through its agent server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from hpc_workspace.client.bundled_commands import BundledCommands
from hpc_workspace.client.calls import Caller
from hpc_workspace.client.order import Order
from hpc_workspace.client.supervised_commands import SupervisedCommands
from hpc_workspace.errors import CommandError
from hpc_workspace.results import CommandOutput, CommandResult, OutputChunk


class Server(Protocol):
    """What both servers are made to do, each in its own way."""

    def execute(self, order: Order) -> CommandResult: ...
    def stream(self, order: Order) -> Iterator[OutputChunk | CommandResult]: ...
    def start(self, order: Order) -> str: ...
    def output(self, command_id: str, wait_s: float, since: CommandOutput | None) -> CommandOutput: ...
    def stop(self, command_id: str) -> None: ...


class Commands:
    """Runs commands by `caller`; see the methods of `Workspace`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._server: Server = BundledCommands(caller) if caller.is_bundled else SupervisedCommands(caller)

    def execute(
        self, command: str, *, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None
    ) -> CommandResult:
        """Run a command to its end."""
        return self._server.execute(self._order(command, cwd, timeout_s, env))

    def stream(
        self, command: str, *, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None
    ) -> Iterator[OutputChunk | CommandResult]:
        """A command's output as it comes, then its result, whose `stdout` and `stderr` are empty."""
        return self._server.stream(self._order(command, cwd, timeout_s, env))

    def start(self, command: str, *, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None) -> str:
        """Start a command that runs on by itself. Returns its id."""
        return self._server.start(self._order(command, cwd, timeout_s, env))

    def output(self, command_id: str, *, wait_s: float = 0.0, since: CommandOutput | None = None) -> CommandOutput:
        """What a started command has printed, after at most `wait_s` for its end."""
        return self._server.output(command_id, wait_s, since)

    def stop(self, command_id: str) -> None:
        """End a started command, and wait until it has."""
        self._server.stop(command_id)

    def _order(self, command: str, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None) -> Order:
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s >= 0):
            raise CommandError(
                "The command could not be started.",
                command=command,
                evidence=f"timeout is {timeout_s!r}",
                remedy="It must be a number of seconds, not negative, or None for none.",
            )
        where = self._caller.absolute(cwd) if cwd else self._caller.working_dir
        return Order(command, where, timeout_s, dict(env or {}))
