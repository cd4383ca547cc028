"""Commands of a workspace, through its agent server."""

from __future__ import annotations

import base64
import contextlib
import math
import shlex
import uuid
from collections.abc import Iterator
from typing import Any

from hpc_workspace import clock
from hpc_workspace.client.calls import Caller, Patience, parse_json
from hpc_workspace.errors import (
    CommandError,
    ServerResponseError,
    ServerUnavailableError,
    TunnelError,
    TunnelLostError,
    WorkspaceError,
)
from hpc_workspace.results import CommandResult, OutputChunk

_GRACE_S = 15.0
_UNPROCESSABLE = 422
_POLLS_S = (0.01, 0.25)
# How long a streamed command goes on alone: longer than its reader tries to come back.
_LINGER_S = 120.0
# How long after a broken connection a request that it carried may still turn up at the server.
_TURN_UP_S = 2.0


class Commands:
    """Runs commands by `caller`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def execute(self, command: str, *, cwd: str | None, timeout_s: float, env: dict[str, str] | None) -> CommandResult:
        """Run a command to its end; see `Workspace.execute_command`."""
        body = self._command_body(command, cwd, timeout_s, env)
        began_s = clock.now_s()
        with _command_errors(command):
            try:
                answer = self._caller.json(
                    "POST",
                    "/api/bash/execute_bash_command",
                    json=body,
                    answer_timeout_s=timeout_s + _GRACE_S,
                    is_repeatable=self._caller.is_bundled,
                )
            except TunnelLostError as error:
                answer = self._find_result(command, body["command"], error)
        return self._as_result(command, answer, timeout_s, clock.now_s() - began_s)

    def _find_result(self, command: str, sent: str, broke: TunnelLostError) -> dict[str, Any]:
        """The result of a command whose connection broke, from a server that knows no ids of ours: by its text.

        Raises:
            CommandError: it may or may not have reached the server.
            TunnelLostError: the way is not mended in time.
        """
        if self._caller.is_bundled:
            raise broke
        deadline = clock.Deadline(_TURN_UP_S)
        params = {"kind__eq": "BashCommand", "sort_order": "TIMESTAMP_DESC"}
        for pause_s in clock.pauses_s(*_POLLS_S):
            page = self._caller.json("GET", "/api/bash/bash_events/search", params=params)
            for event in page["items"]:
                if event.get("command") == sent:
                    return self._collect(str(event["id"]))
            if deadline.is_over:
                break
            clock.sleep(pause_s)
        raise CommandError(
            "The connection broke, and the agent server does not know the command: it may or may not run yet.",
            command=command,
            evidence=broke.evidence,
        ) from broke

    def _collect(self, command_id: str) -> dict[str, Any]:
        """All that a command prints until it ends, and its exit code, as a server that streams nothing tells it."""
        said = {"stdout": "", "stderr": ""}
        for event in self._outputs(command_id):
            for name in said:
                said[name] += event.get(name) or ""
            if event.get("exit_code") is not None:
                return event | said
        raise AssertionError("outputs end with an exit code")

    def _outputs(self, command_id: str) -> Iterator[dict[str, Any]]:
        """The output events of a command, in order, as they come; the last one has its exit code."""
        order = -1
        for pause_s in clock.pauses_s(*_POLLS_S):
            params = {"command_id__eq": command_id, "kind__eq": "BashOutput", "order__gt": str(order)}
            page = self._caller.json("GET", "/api/bash/bash_events/search", params=params)
            for event in page["items"]:
                order = max(order, int(event["order"]))
                yield event
                if event.get("exit_code") is not None:
                    return
            clock.sleep(pause_s)

    def stream(
        self, command: str, *, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None
    ) -> Iterator[OutputChunk | CommandResult]:
        """A command's output as it comes, then its result, whose `stdout` and `stderr` are empty."""
        if not self._caller.is_bundled:
            yield from self._poll(command, cwd, timeout_s, env)
            return
        body = self._command_body(command, cwd, timeout_s, env) | {"linger_s": _LINGER_S}
        read_timeout = None if timeout_s is None else timeout_s + _GRACE_S
        patience = Patience()
        call_began_s = clock.now_s()
        has_ended = False
        try:
            while not has_ended:
                began_s = clock.now_s()
                try:
                    for item in self._stream_on(command, body, read_timeout, call_began_s):
                        patience.renew()
                        has_ended = isinstance(item, CommandResult)
                        if isinstance(item, OutputChunk):
                            body[f"{item.stream}_from"] = body.get(f"{item.stream}_from", 0) + len(item.data)
                        yield item
                except (TunnelError, ServerUnavailableError) as error:
                    patience.wait(error, began_s)
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            self._stop(body["id"])
            raise

    def _stream_on(
        self, command: str, body: dict[str, Any], read_timeout: float | None, call_began_s: float
    ) -> Iterator[OutputChunk | CommandResult]:
        """The rest of a stream, from where `body` says; the last item is the result.

        Raises:
            ServerUnavailableError: it broke off before.
        """
        began_s = clock.now_s()
        with _command_errors(command):
            response = self._caller.send(
                "POST",
                "/api/bash/stream",
                json=body,
                answer_timeout_s=read_timeout,
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
                        command=command,
                        exit_code=int(event["exit_code"]),
                        timeout_occurred=bool(event.get("timeout_occurred")),
                    )
                    return
            cut = ServerUnavailableError("The stream of a command ended before the command did.")
            raise self._caller.explain(cut, began_s)
        finally:
            response.close()

    def _stop(self, command_id: str) -> None:
        """End a command that nobody wants any more. If that can't be told, the server ends it by itself later."""
        with contextlib.suppress(WorkspaceError):
            self._caller.send("POST", f"/api/bash/bash_commands/{command_id}/stop", is_repeatable=False)

    def _poll(
        self, command: str, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None
    ) -> Iterator[OutputChunk | CommandResult]:
        """OpenHands' server streams nothing below 1 MiB: ask for what there is until there is an exit code."""
        body = self._command_body(command, cwd, 86400.0 if timeout_s is None else timeout_s, env)
        began_s = clock.now_s()
        started = self._caller.json("POST", "/api/bash/start_bash_command", json=body, is_repeatable=False)
        for event in self._outputs(str(started["id"])):
            for name in ("stdout", "stderr"):
                if event.get(name):
                    yield OutputChunk(stream=name, data=event[name].encode("utf-8", "surrogateescape"))
            if event.get("exit_code") is not None:
                result = self._as_result(command, event, timeout_s or math.inf, clock.now_s() - began_s)
                yield result.model_copy(update={"stdout": "", "stderr": ""})

    def _command_body(
        self, command: str, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None
    ) -> dict[str, Any]:
        where = self._caller.absolute(cwd) if cwd else self._caller.working_dir
        if self._caller.is_bundled:
            return {"id": str(uuid.uuid4()), "command": command, "cwd": where, "timeout": timeout_s, "env": env or {}}
        # OpenHands' server runs /bin/sh, takes whole seconds (0 means none at all), and gives its own stdin.
        # The remark makes the text one of its kind: it is all that a command can be found by if its connection breaks.
        line = f"{wrap_command(command, where, env or {})} # {uuid.uuid4()}"
        return {"command": line, "timeout": max(1, math.ceil(timeout_s or 1))}

    def _as_result(self, command: str, answer: dict[str, Any], timeout_s: float, took_s: float) -> CommandResult:
        code = answer.get("exit_code")
        if not isinstance(code, int):
            raise ServerResponseError("The agent server gave no exit code.", evidence=str(answer)[:500])
        timed_out = bool(answer.get("timeout_occurred"))
        if not self._caller.is_bundled and code == -1:
            # Its -1 is a time-out, or a spawn that failed; only the clock tells them apart.
            timed_out = took_s >= math.floor(timeout_s)
            if not timed_out:
                raise CommandError(
                    "The agent server could not start a command.", command=command, evidence=str(answer.get("stderr"))
                )
        return CommandResult(
            command=command,
            exit_code=code,
            stdout=_text(answer, "stdout"),
            stderr=_text(answer, "stderr"),
            timeout_occurred=timed_out,
            truncated=bool(answer.get("stdout_truncated") or answer.get("stderr_truncated")),
        )


def wrap_command(command: str, cwd: str, env: dict[str, str]) -> str:
    """`command` for a server that runs /bin/sh: in `cwd`, with `env` and an empty stdin, in bash where there is one."""
    settings = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
    line = shlex.quote(command)
    return (
        f"cd -- {shlex.quote(cwd)} || exit 1; {settings}"
        f"if command -v bash >/dev/null 2>&1; then exec bash -c {line} </dev/null; "
        f"else exec sh -c {line} </dev/null; fi"
    )


@contextlib.contextmanager
def _command_errors(command: str) -> Iterator[None]:
    """A server's "this can't be done" (422) to a command, as the error that says so."""
    try:
        yield
    except ServerResponseError as error:
        if error.status != _UNPROCESSABLE:
            raise
        raise CommandError("The command could not be started.", command=command, evidence=error.evidence) from error


def _text(answer: dict[str, Any], name: str) -> str:
    encoded = answer.get(f"{name}_b64")
    if encoded:
        return base64.b64decode(encoded).decode("utf-8", "surrogateescape")
    return str(answer.get(name) or "")


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line for line in whole if line)
    if rest:
        yield rest
