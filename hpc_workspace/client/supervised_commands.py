"""Commands on OpenHands' server (1.58): each supervised by a shell of ours (`supervising`), its output read from files.

It knows no ids of ours and runs whatever it gets, so nothing that starts a command is sent twice.
"""

from __future__ import annotations

import codecs
import contextlib
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from hpc_workspace import clock
from hpc_workspace.client import supervising
from hpc_workspace.client.calls import Caller, Patience
from hpc_workspace.client.order import (
    GRACE_S,
    OUTPUT_BYTES,
    Order,
    not_started,
    start_errors,
    unknown_command,
)
from hpc_workspace.errors import (
    CommandError,
    ServerResponseError,
    ServerUnavailableError,
    TunnelError,
    TunnelLostError,
    WorkspaceError,
)
from hpc_workspace.results import CommandOutput, CommandResult, OutputChunk

_POLLS_S = (0.01, 0.25)
# How long after a broken connection a request that it carried may still turn up at the server.
_TURN_UP_S = 2.0
# How long a started command may take until its shell says that it runs, on a node that is busy.
_BEGIN_S = 30.0
# How often to make sure that there is still somebody to say how a command ended.
_ASK_S = 5.0
_SCRIPT_S = 10
# The server wants a number of seconds: thirty years.
_FOREVER_S = 1_000_000_000
# It times whole seconds itself; where our timer does, it is to be later.
_LATER_S = 10
# Files of ended commands are removed with a later command, so many at a time.
_SPENT = 16
_NOT_FOUND, _RANGE_NOT_SATISFIABLE, _PARTIAL = 404, 416, 206
_REPLACEMENT = "\ufffd"


class SupervisedCommands:
    """Runs commands by `caller`, on OpenHands' server."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._spent: deque[str] = deque()
        self._asked_s: dict[str, float] = {}

    def execute(self, order: Order) -> CommandResult:
        """Run a command to its end."""
        timeout_s = order.timeout_s
        is_timed_by_server = timeout_s is not None and timeout_s >= 1 and timeout_s == int(timeout_s)
        timer_s = None if is_timed_by_server else timeout_s
        text = _text(order, timer_s=timer_s, is_told=True, spent=self._take_spent())
        limit_s = timeout_s if is_timed_by_server else None
        call_began_s = clock.now_s()
        try:
            with start_errors(order.command):
                answer = self._run(
                    text, _whole_seconds(timeout_s, limit_s), is_repeatable=False, call_began_s=call_began_s
                )
        except TunnelLostError as broke:
            code = self._find_code(order, broke, limit_s, call_began_s)
            return self._result(order, code, call_began_s)
        said, is_supervised, code = str(answer.get("stderr") or "").rpartition(f"\n{order.id} ")
        if is_supervised:
            return self._result(order, code.strip(), call_began_s, (str(answer.get("stdout") or ""), said))
        if answer.get("exit_code") != -1:
            # The command has killed its supervisor too: what the server saw of that is how it ended.
            return self._result(order, str(answer.get("exit_code")), call_began_s)
        if (limit_s or math.inf) > clock.now_s() - call_began_s:
            # Its -1 is a time-out, or a spawn that failed.
            raise not_started(order.command, said or code)
        self._end(order.id, call_began_s)
        return self._result(order, supervising.TIMED_OUT, call_began_s)

    def start(self, order: Order) -> str:
        """Start a command that runs on by itself, and return when it does."""
        call_began_s = clock.now_s()
        try:
            self._start(order, call_began_s)
        except TunnelLostError as broke:
            self._find(order, broke, call_began_s)
        self._wait_begun(order, call_began_s)
        return order.id

    def stop(self, command_id: str) -> None:
        """End a started command, and wait until it has."""
        _require_id(command_id)
        self._end(command_id, clock.now_s())

    def output(self, command_id: str, wait_s: float, since: CommandOutput | None) -> CommandOutput:
        """What a started command has printed, after at most `wait_s` for its end."""
        _require_id(command_id)
        deadline = clock.Deadline(wait_s)
        call_began_s = clock.now_s()
        pauses_s = clock.pauses_s(*_POLLS_S)
        if not any(self._read_small(command_id, kind, call_began_s) for kind in ("pid", "end")):
            raise unknown_command(command_id)
        while (code := self._end_code(command_id, call_began_s)) is None and not deadline.is_over:
            clock.sleep(min(next(pauses_s), deadline.left_s))
        places = (0, 0) if since is None else (since.stdout_end, since.stderr_end)
        (out, more_out), (err, more_err) = (
            self._read(command_id, name, place, call_began_s)
            for name, place in zip(("out", "err"), places, strict=True)
        )
        exit_code, has_timed_out = _meaning(code, "") if code is not None else (None, False)
        return CommandOutput(
            command_id=command_id,
            exit_code=exit_code,
            timeout_occurred=has_timed_out,
            truncated=more_out or more_err,
            stdout=_decoded(out, is_last=code is not None and not more_out),
            stderr=_decoded(err, is_last=code is not None and not more_err),
            stdout_from=places[0],
            stderr_from=places[1],
            stdout_file=supervising.place(command_id, "out"),
            stderr_file=supervising.place(command_id, "err"),
        )

    def stream(self, order: Order) -> Iterator[OutputChunk | CommandResult]:
        """A command's output as its files get longer, then its result."""
        call_began_s = clock.now_s()
        self.start(order)
        pauses_s = clock.pauses_s(*_POLLS_S)
        places = {"out": 0, "err": 0}
        code = None
        try:
            while True:
                has_more = False
                for kind, name in (("out", "stdout"), ("err", "stderr")):
                    data, more = self._read(order.id, kind, places[kind], call_began_s)
                    places[kind] += len(data)
                    has_more = has_more or more
                    if data:
                        pauses_s = clock.pauses_s(*_POLLS_S)
                        yield OutputChunk(stream=name, data=data)
                if code is not None and not has_more:
                    break
                if code is None and (code := self._end_code(order.id, call_began_s)) is None and not has_more:
                    clock.sleep(next(pauses_s))
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            with contextlib.suppress(WorkspaceError):
                self._end(order.id, call_began_s)
            raise
        self._spent.append(order.id)
        exit_code, has_timed_out = _meaning(code, order.command)
        yield CommandResult(command=order.command, exit_code=exit_code, timeout_occurred=has_timed_out)

    def _start(self, order: Order, call_began_s: float) -> None:
        text = _text(order, timer_s=order.timeout_s, is_told=False, spent=self._take_spent())
        body = {"command": text, "timeout": _whole_seconds(order.timeout_s, None)}
        with start_errors(order.command):
            self._caller.send(
                "POST", "/api/bash/start_bash_command", json=body, is_repeatable=False, call_began_s=call_began_s
            )

    def _wait_begun(self, order: Order, call_began_s: float) -> None:
        deadline = clock.Deadline(_BEGIN_S)
        for pause_s in clock.pauses_s(*_POLLS_S):
            if self._read_small(order.id, "pid", call_began_s):
                return
            code = self._read_small(order.id, "end", call_began_s)
            if code == supervising.NOT_STARTED:
                _meaning(code, order.command)
            if deadline.is_over:
                raise not_started(order.command, f"no sign of it after {_BEGIN_S:.0f} s")
            clock.sleep(pause_s)

    def _find(self, order: Order, broke: TunnelLostError, call_began_s: float) -> None:
        """Wait a moment for a command to turn up whose connection broke.

        Raises:
            CommandError: it may or may not have reached the server.
        """
        deadline = clock.Deadline(_TURN_UP_S)
        for pause_s in clock.pauses_s(*_POLLS_S):
            if any(self._read_small(order.id, kind, call_began_s) for kind in ("pid", "end")):
                return
            if deadline.is_over:
                raise CommandError(
                    "The connection broke, and the agent server does not know the command: it may or may not run yet.",
                    command=order.command,
                    evidence=broke.evidence,
                ) from broke
            clock.sleep(pause_s)

    def _find_code(self, order: Order, broke: TunnelLostError, limit_s: float | None, call_began_s: float) -> str:
        """How a command ended whose connection broke."""
        self._find(order, broke, call_began_s)
        deadline = clock.Deadline(None if limit_s is None else limit_s + GRACE_S)
        for pause_s in clock.pauses_s(*_POLLS_S):
            try:
                code = self._end_code(order.id, call_began_s)
            except CommandError:
                if (limit_s or math.inf) > clock.now_s() - call_began_s:
                    raise
                code = None
            if code is not None:
                return code
            if (limit_s or math.inf) <= clock.now_s() - call_began_s and deadline.is_over:
                break
            clock.sleep(pause_s)
        self._end(order.id, call_began_s)
        return supervising.TIMED_OUT

    def _result(
        self, order: Order, code: str, call_began_s: float, told: tuple[str, str] | None = None
    ) -> CommandResult:
        exit_code, has_timed_out = _meaning(code, order.command)
        texts, is_cut = {}, False
        for place, (kind, name) in enumerate((("out", "stdout"), ("err", "stderr"))):
            if told is not None and _is_exact(told[place]):
                texts[name] = told[place]
                continue
            data, has_more = self._read(order.id, kind, 0, call_began_s)
            texts[name] = _decoded(data, is_last=not has_more)
            is_cut = is_cut or has_more
        files = {f"{name}_file": supervising.place(order.id, name[3:]) for name in texts} if is_cut else {}
        if not is_cut:
            self._spent.append(order.id)
        return CommandResult(
            command=order.command,
            exit_code=exit_code,
            timeout_occurred=has_timed_out,
            truncated=is_cut,
            **texts,
            **files,
        )

    def _end(self, command_id: str, call_began_s: float) -> None:
        answer = self._run(supervising.ending(command_id), _SCRIPT_S, call_began_s=call_began_s)
        if answer.get("exit_code") == supervising.UNKNOWN:
            raise unknown_command(command_id)

    def _end_code(self, command_id: str, call_began_s: float) -> str | None:
        """How a command ended; None while it runs.

        Raises:
            CommandError: nobody is left who could say how it did.
            UnknownCommandError: there is no such command.
        """
        if code := self._read_small(command_id, "end", call_began_s):
            self._asked_s.pop(command_id, None)
            return code
        if self._asked_s.setdefault(command_id, call_began_s) + _ASK_S > clock.now_s():
            return None
        self._asked_s[command_id] = clock.now_s()
        answer = self._run(supervising.asking(command_id), _SCRIPT_S, call_began_s=call_began_s)
        if answer.get("exit_code") == 0:
            return self._read_small(command_id, "end", call_began_s) or None
        raise CommandError(
            f"Command {command_id} has ended, and nothing says how.",
            evidence="The shell that ran it was killed with it.",
            remedy="What it had printed is in the workspace, in "
            f"{supervising.place(command_id, 'out')} and {supervising.place(command_id, 'err')}.",
        )

    def _run(
        self, text: str, timeout_s: int, *, is_repeatable: bool = True, call_began_s: float | None = None
    ) -> dict[str, Any]:
        return self._caller.json(
            "POST",
            "/api/bash/execute_bash_command",
            json={"command": text, "timeout": timeout_s},
            answer_timeout_s=None if timeout_s >= _FOREVER_S else timeout_s + GRACE_S,
            is_repeatable=is_repeatable,
            call_began_s=call_began_s,
        )

    def _read_small(self, command_id: str, kind: str, call_began_s: float) -> str:
        """A word of a command's supervisor; empty where it has not said it."""
        try:
            data, _ = self._read_once(command_id, kind, 0, 64, call_began_s)
        except ServerResponseError as error:
            if error.status != _NOT_FOUND:
                raise
            return ""
        return data.decode("ascii", "replace").strip()

    def _read(self, command_id: str, kind: str, place: int, call_began_s: float) -> tuple[bytes, bool]:
        """What a command's output has from `place` on, and whether there is more of it."""
        patience = Patience()
        while True:
            began_s = clock.now_s()
            try:
                return self._read_once(command_id, kind, place, OUTPUT_BYTES, call_began_s)
            except (TunnelError, ServerUnavailableError) as error:
                patience.wait(error, began_s)
            except ServerResponseError as error:
                if error.status != _NOT_FOUND:
                    raise
                raise unknown_command(command_id, error.evidence) from error

    def _read_once(self, command_id: str, kind: str, place: int, limit: int, call_began_s: float) -> tuple[bytes, bool]:
        began_s = clock.now_s()
        try:
            response = self._caller.send(
                "GET",
                "/api/file/download",
                params={"path": supervising.place(command_id, kind)},
                headers={"Range": f"bytes={place}-{place + limit}", "Accept-Encoding": "identity"},
                is_streamed=True,
                call_began_s=call_began_s,
            )
        except ServerResponseError as error:
            if error.status != _RANGE_NOT_SATISFIABLE:
                raise
            return b"", False
        # Starlette before 0.39 knows no ranges, and sends all of it.
        skipped = 0 if response.status_code == _PARTIAL else place
        found = bytearray()
        try:
            for piece in self._caller.guarded(response.iter_raw(), began_s):
                found += piece[skipped:]
                skipped = max(0, skipped - len(piece))
                if len(found) > limit:
                    break
        finally:
            response.close()
        return bytes(found[:limit]), len(found) > limit

    def _take_spent(self) -> list[str]:
        """Commands whose files are to be removed, once there are enough to be worth a process."""
        if len(self._spent) < _SPENT:
            return []
        taken: list[str] = []
        with contextlib.suppress(IndexError):  # another thread has taken some
            while len(taken) < _SPENT:
                taken.append(self._spent.popleft())
        return taken


def _text(order: Order, *, timer_s: float | None, is_told: bool, spent: list[str]) -> str:
    try:
        return supervising.supervised(
            order.command,
            command_id=order.id,
            cwd=order.cwd,
            env=order.env,
            timer_s=timer_s,
            is_told=is_told,
            spent=spent,
        )
    except ValueError as error:
        raise not_started(order.command, str(error)) from error


def _whole_seconds(timeout_s: float | None, limit_s: float | None) -> int:
    if limit_s is not None:
        return int(limit_s)
    return _FOREVER_S if timeout_s is None else math.ceil(timeout_s) + _LATER_S


def _meaning(code: str | None, command: str) -> tuple[int, bool]:
    """Exit code and whether the time ran out, of what a supervisor said.

    Raises:
        CommandError: the command was not started.
    """
    if code == supervising.NOT_STARTED:
        raise not_started(command, "cwd is no directory, or the container's /tmp can't be written")
    if code == supervising.TIMED_OUT:
        return -1, True
    try:
        return int(code or ""), False
    except ValueError:
        raise ServerResponseError("The agent server gave no exit code.", evidence=repr(code)[:500]) from None


def _is_exact(told: str) -> bool:
    """Whether the server's text is all of the output, and every byte of it UTF-8."""
    return _REPLACEMENT not in told and len(told.encode("utf-8", "replace")) <= supervising.TOLD_BYTES


def _decoded(data: bytes, *, is_last: bool) -> str:
    """`data` as text; unless it is the last, without the beginning of a character that is still to come."""
    return codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(data, is_last)


def _require_id(command_id: str) -> None:
    """An id is a part of a path and of a shell's text: anything else is none.

    Raises:
        UnknownCommandError: it is none of ours.
    """
    if not (len(command_id) == 32 and all(letter in "0123456789abcdef" for letter in command_id)):
        raise unknown_command(command_id)
