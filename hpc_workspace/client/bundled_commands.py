"""Commands on the bundled server: it knows our ids, so that a request can be sent again, and streams."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from typing import Any

from hpc_workspace import clock
from hpc_workspace.client.calls import Caller, Patience, parse_json
from hpc_workspace.client.order import Order, start_errors, unknown_errors
from hpc_workspace.errors import ServerResponseError, ServerUnavailableError, TunnelError, WorkspaceError
from hpc_workspace.results import CommandOutput, CommandResult, OutputChunk

# How long a streamed command goes on alone: longer than its reader tries to come back.
_LINGER_S = 120.0
# How long one request waits for the end of a command; below what a server may say nothing for.
_WAIT_S = 20.0


class BundledCommands:
    """Runs commands by `caller`, on the bundled server."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def execute(self, order: Order) -> CommandResult:
        """Run a command to its end."""
        with start_errors(order.command):
            answer = self._caller.json(
                "POST", "/api/bash/execute_bash_command", json=_body(order), answer_timeout_s=order.answer_timeout_s
            )
        code = answer.get("exit_code")
        if not isinstance(code, int):
            raise ServerResponseError("The agent server gave no exit code.", evidence=str(answer)[:500])
        truncated = bool(answer.get("stdout_truncated") or answer.get("stderr_truncated"))
        return CommandResult(command=order.command, exit_code=code, truncated=truncated, **_outcome(answer))

    def start(self, order: Order) -> str:
        """Start a command that runs on by itself."""
        with start_errors(order.command):
            self._caller.json("POST", "/api/bash/start_bash_command", json=_body(order))
        return order.id

    def output(self, command_id: str, wait_s: float, since: CommandOutput | None) -> CommandOutput:
        """What a started command has printed, after at most `wait_s` for its end."""
        deadline = clock.Deadline(wait_s)
        call_began_s = clock.now_s()
        is_running = wait_s > 0
        while is_running:
            pause_s = min(deadline.left_s, _WAIT_S)
            is_running = self._output(command_id, call_began_s, wait_s=pause_s, limit_bytes=0)["running"]
            is_running = is_running and not deadline.is_over
        places = {} if since is None else {"stdout_from": since.stdout_end, "stderr_from": since.stderr_end}
        answer = self._output(command_id, call_began_s, **places)
        return CommandOutput(
            command_id=command_id,
            exit_code=answer["exit_code"],
            truncated=answer["stdout_more"] or answer["stderr_more"],
            stdout_from=answer["stdout_from"],
            stderr_from=answer["stderr_from"],
            **_outcome(answer),
        )

    def _output(self, command_id: str, call_began_s: float, **params: float) -> dict[str, Any]:
        path = f"/api/bash/bash_commands/{_path_part(command_id)}/output"
        with unknown_errors(command_id):
            return self._caller.json("GET", path, params=params, call_began_s=call_began_s)

    def stop(self, command_id: str) -> None:
        """End a started command, and wait until it has."""
        with unknown_errors(command_id):
            self._caller.send("POST", f"/api/bash/bash_commands/{_path_part(command_id)}/stop")

    def stream(self, order: Order) -> Iterator[OutputChunk | CommandResult]:
        """A command's output as it comes, then its result."""
        body = _body(order) | {"linger_s": _LINGER_S}
        patience = Patience()
        call_began_s = clock.now_s()
        has_ended = False
        try:
            while not has_ended:
                began_s = clock.now_s()
                try:
                    for item in self._stream_on(order, body, call_began_s):
                        patience.renew()
                        has_ended = isinstance(item, CommandResult)
                        if isinstance(item, OutputChunk):
                            body[f"{item.stream}_from"] = body.get(f"{item.stream}_from", 0) + len(item.data)
                        yield item
                except (TunnelError, ServerUnavailableError) as error:
                    patience.wait(error, began_s)
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            self._give_up(order.id)
            raise

    def _stream_on(
        self, order: Order, body: dict[str, Any], call_began_s: float
    ) -> Iterator[OutputChunk | CommandResult]:
        """The rest of a stream, from where `body` says; the last item is the result.

        Raises:
            ServerUnavailableError: it broke off before.
        """
        began_s = clock.now_s()
        with start_errors(order.command):
            response = self._caller.send(
                "POST",
                "/api/bash/stream",
                json=body,
                answer_timeout_s=order.answer_timeout_s,
                is_streamed=True,
                call_began_s=call_began_s,
            )
        try:
            for line in _lines(self._caller.guarded(response.iter_raw(), began_s)):
                event = parse_json(line)
                if "data_b64" in event:
                    yield OutputChunk(stream=event["stream"], data=base64.b64decode(event["data_b64"]))
                elif "exit_code" in event:
                    yield CommandResult(
                        command=order.command,
                        exit_code=int(event["exit_code"]),
                        timeout_occurred=bool(event.get("timeout_occurred")),
                        stdout_file=event.get("stdout_file"),
                        stderr_file=event.get("stderr_file"),
                    )
                    return
            cut = ServerUnavailableError("The stream of a command ended before the command did.")
            raise self._caller.explain(cut, began_s)
        finally:
            response.close()

    def _give_up(self, command_id: str) -> None:
        """End a command that nobody wants any more. If that can't be told, the server ends it by itself later."""
        with contextlib.suppress(WorkspaceError):
            self._caller.send("POST", f"/api/bash/bash_commands/{command_id}/stop", is_repeatable=False)


def _body(order: Order) -> dict[str, Any]:
    return {
        "id": order.id,
        "command": order.command,
        "cwd": order.cwd,
        "timeout": order.timeout_s,
        "env": order.env,
    }


def _outcome(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "stdout": _text(answer, "stdout"),
        "stderr": _text(answer, "stderr"),
        "timeout_occurred": bool(answer.get("timeout_occurred")),
        "stdout_file": answer.get("stdout_file"),
        "stderr_file": answer.get("stderr_file"),
    }


def _text(answer: dict[str, Any], name: str) -> str:
    encoded = answer.get(f"{name}_b64")
    if encoded:
        return base64.b64decode(encoded).decode("utf-8", "surrogateescape")
    return str(answer.get(name) or "")


def _path_part(command_id: str) -> str:
    """An id as a part of a path: anything that is no id must not name another route."""
    return command_id if command_id.isalnum() and command_id.isascii() else "-"


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line for line in whole if line)
    if rest:
        yield rest
