"""One command: from its start to the last byte that counts as its output.

A command is over when its shell has exited. What is in the pipes then still counts, and so does what comes within
50 ms (process substitutions finish just after the shell); a background child that holds the pipes is left alone.
"""

import asyncio
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_workspace.server.children import PipeReader, attach, spawn, watch_exit
from hpc_workspace.server.output import WINDOW_BYTES, OutputLog, as_fields, whole_characters
from hpc_workspace.server.requests import CommandRequest, RequestError
from hpc_workspace.server.sessions import MARK_NAME, Family, end_family

STREAMS = ("stdout", "stderr")
_DRAIN_S = 0.05
_GRACE_S = 1.0
_EVENT_BYTES = 128 * 1024


def now_text() -> str:
    """The time of an event, as upstream writes it."""
    return datetime.now(UTC).isoformat()


@dataclass(frozen=True)
class Event:
    """One entry of the event list: the command itself, or a part of its output (offsets into its logs)."""

    sequence: int
    id: str
    timestamp: str
    command: "Command" = field(repr=False)
    order: int | None = None
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    is_last: bool = False

    @property
    def kind(self) -> str:
        """`BashCommand` or `BashOutput`."""
        return "BashCommand" if self.order is None else "BashOutput"

    def as_json(self) -> dict[str, Any]:
        """The event in upstream's shape, with our additions."""
        if self.order is None:
            return self.command.as_json()
        answer: dict[str, Any] = {"id": self.id, "timestamp": self.timestamp, "kind": self.kind}
        answer |= {"command_id": self.command.id, "order": self.order, "exit_code": None, "timeout_occurred": False}
        for name in STREAMS:
            answer |= as_fields(name, self.command.logs[name].head(*self.parts[name]))
        return answer | self.command.outcome_json() if self.is_last else answer


class Follower:
    """A place in a command's output, woken when there is more; the command waits for it, at most 1 MiB ahead."""

    def __init__(self, command: "Command", offsets: dict[str, int]) -> None:
        self._command = command
        self._wake = asyncio.Event()
        self.offsets = offsets

    def wake(self) -> None:
        """Something was written, or the command ended."""
        self._wake.set()

    def take(self) -> list[tuple[str, bytes]]:
        """The next pieces, at most one a stream; empty where nothing is waiting."""
        self._wake.clear()
        pieces = []
        for name in STREAMS:
            self.offsets[name], data = self._command.logs[name].read_from(self.offsets[name])
            if data:
                pieces.append((name, data))
        if pieces:
            self._command.adjust_flow()
        return pieces

    async def wait(self) -> None:
        """Until `wake`."""
        await self._wake.wait()


class Command:
    """A running or ended command.

    Args:
        publish: called with every new event; must not block.
    """

    def __init__(
        self, request: CommandRequest, *, cwd: str, spool_dir: Path, sequence: Callable[[], int],
        publish: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self.id = request.id
        self.request = request
        self.cwd = cwd
        self.logs = {name: OutputLog(spool_dir / f"{request.id}.{name}") for name in STREAMS}
        self.exit_code: int | None = None
        self.has_timed_out = False
        # Ended because the server ends: its exit code says nothing of the command, so nobody is told one.
        self.is_cut_short = False
        self.finished = asyncio.Event()
        self.duration_s: float | None = None
        self.events: list[Event] = []
        self.family: Family | None = None
        self._sequence = sequence
        self._publish = publish
        self._started_s = time.monotonic()
        self._emitted = dict.fromkeys(STREAMS, 0)
        self._order = 0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._followers: set[Follower] = set()
        self._readers: tuple[PipeReader, ...] = ()
        self._stop_requested = asyncio.Event()
        self.timestamp = now_text()
        self._add(Event(sequence(), self.id, self.timestamp, self))

    @property
    def is_running(self) -> bool:
        """Whether its shell has not ended yet."""
        return not self.finished.is_set()

    def as_json(self) -> dict[str, Any]:
        """The BashCommand event: what runs, and whether it still does."""
        return {
            "id": self.id,
            "timestamp": self.timestamp,
            "kind": "BashCommand",
            "command": self.request.command,
            "cwd": self.cwd,
            "timeout": self.request.timeout_s,
            "running": self.is_running,
            "exit_code": self.exit_code,
        }

    def outcome_json(self) -> dict[str, Any]:
        """How it ended, and how much it wrote."""
        answer: dict[str, Any] = {
            "exit_code": self.exit_code,
            "timeout_occurred": self.has_timed_out,
            "duration": self.duration_s,
        }
        for name, log in self.logs.items():
            answer[f"{name}_bytes"] = log.total
            answer[f"{name}_truncated"] = log.is_truncated
            answer[f"{name}_file"] = log.file
        return answer

    def result_json(self) -> dict[str, Any]:
        """The last BashOutput with the whole output joined (up to what is kept in memory)."""
        answer = self.events[-1].as_json()
        for name in STREAMS:
            answer |= as_fields(name, self.logs[name].head())
        return answer

    def output_json(self, offsets: Mapping[str, int], limit: int) -> dict[str, Any]:
        """What it has written at or after `offsets`, at most `limit` bytes of each, and how it ended if it has."""
        answer: dict[str, Any] = {"id": self.id, "running": self.is_running} | self.outcome_json()
        for name, log in self.logs.items():
            start, data = log.read_many(offsets[name], limit)
            has_more = start + len(data) < log.total
            if has_more or self.is_running:
                data = data[: whole_characters(data)]
            answer |= as_fields(name, data)
            answer |= {f"{name}_from": start, f"{name}_more": has_more}
        return answer

    def start(self, env: Mapping[str, str]) -> "asyncio.Task[None]":
        """Start the shell; returns the task that ends with the command.

        Raises:
            RequestError: 422: the directory or the program can't be used.
        """
        argv = [find_shell(env), "-c", self.request.command]
        try:
            popen = spawn(argv, cwd=self.cwd, env={**env, **self.request.env, MARK_NAME: self.id})
        except (OSError, ValueError) as error:
            raise RequestError(f"the command can't be started in {self.cwd}: {error}") from error
        self.family = family = Family(popen.pid, self.id)
        self._readers = attach(popen, lambda data: self._on_output("stdout", data),
                               lambda data: self._on_output("stderr", data))  # fmt: skip
        return asyncio.create_task(self._supervise(popen, family))

    def request_stop(self) -> None:
        """Begin to end it (TERM, a second, KILL); `finished` tells when it is over."""
        self._stop_requested.set()

    def end_when_alone(self, after_s: float) -> None:
        """Begin to end it if nobody follows it `after_s` from now."""

        def look() -> None:
            if not self._followers:
                self.request_stop()

        if self.is_running:
            asyncio.get_running_loop().call_later(after_s, look)

    def follow(self, *, stdout: int = 0, stderr: int = 0) -> Follower:
        """A new follower, who has so many bytes of each already."""
        follower = Follower(self, {"stdout": stdout, "stderr": stderr})
        self._followers.add(follower)
        self.adjust_flow()
        return follower

    def unfollow(self, follower: Follower) -> None:
        """Take a follower away: the command no longer waits for him."""
        self._followers.discard(follower)
        self.adjust_flow()

    def adjust_flow(self) -> None:
        """Pause the pipe that is a window ahead of its slowest follower; read the others."""
        for name, reader in zip(STREAMS, self._readers, strict=False):
            behind = max((self.logs[name].total - one.offsets[name] for one in self._followers), default=0)
            if behind > WINDOW_BYTES and self.is_running:
                reader.pause()
            else:
                reader.resume()

    def discard(self) -> None:
        """Free its files; it is forgotten afterwards."""
        for log in self.logs.values():
            log.discard()

    async def _supervise(self, popen: "subprocess.Popen[bytes]", family: Family) -> None:
        exited = watch_exit(popen.pid)
        stopped = asyncio.create_task(self._stop_requested.wait())
        either: set[asyncio.Future[Any]] = {exited, stopped}
        done, _ = await asyncio.wait(either, timeout=self.request.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if exited not in done:
            self.has_timed_out = stopped not in done
            await end_family(family, grace_s=_GRACE_S)
            await exited
        await self._drain()
        code = popen.wait()
        self._finish(-1 if self.has_timed_out else code)

    async def _drain(self) -> None:
        for reader in self._readers:
            reader.drain_present()
        pending = [reader.ended for reader in self._readers if not reader.ended.done()]
        if pending:
            await asyncio.wait(pending, timeout=_DRAIN_S)
        for reader in self._readers:
            reader.discard()
        self._readers = ()

    def _on_output(self, name: str, data: bytes) -> None:
        self.logs[name].append(data)
        for follower in self._followers:
            follower.wake()
        if self._followers:
            self.adjust_flow()
        if self._pending_bytes() >= _EVENT_BYTES:
            self._flush()
        elif self._flush_timer is None and not self.logs[name].is_truncated:
            self._flush_timer = asyncio.get_running_loop().call_later(self._flush_delay_s(), self._flush)

    def _flush_delay_s(self) -> float:
        """Events come quickly at first; a command that dribbles for hours must not fill memory with them."""
        return 0.02 if self._order < 500 else 0.2 if self._order < 5_000 else 2.0

    def _pending_bytes(self) -> int:
        return sum(log.head_size - self._emitted[name] for name, log in self.logs.items())

    def _flush(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        if self.is_running:
            self._emit(is_last=False)

    def _emit(self, *, is_last: bool) -> None:
        parts = {}
        for name, log in self.logs.items():
            start = self._emitted[name]
            data = log.head(start)
            end = start + (len(data) if is_last else whole_characters(data))
            parts[name] = (start, end)
            self._emitted[name] = end
        if is_last or any(start < end for start, end in parts.values()):
            order, self._order = self._order, self._order + 1
            self._add(Event(self._sequence(), uuid.uuid4().hex, now_text(), self, order, parts, is_last))

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self._publish(event)

    def _finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.duration_s = time.monotonic() - self._started_s
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        self._emit(is_last=True)
        self.finished.set()
        for follower in self._followers:
            follower.wake()


def find_shell(env: Mapping[str, str]) -> str:
    """The image's bash, else its sh (looked for anew: an agent may install bash)."""
    path = env.get("PATH", os.defpath)
    return shutil.which("bash", path=path) or shutil.which("bash", path=os.defpath) or "/bin/sh"
