"""All commands of this server: by id, as a list of events, and for subscribers.

Bounded: of the ended commands, the last 1000, and of those no more than 128 MiB of output. A command's id is
remembered longer than its output, so that a late retry does not run it twice.
"""

import asyncio
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpc_workspace.server.commands import Command, Event
from hpc_workspace.server.requests import CommandRequest, RequestError
from hpc_workspace.server.sessions import end_family
from hpc_workspace.server.settings import Settings, command_environment

_KEPT_COMMANDS = 1000
_KEPT_BYTES = 128 * 1024 * 1024
_KEPT_IDS = 100_000
_QUEUED_EVENTS = 256


class Subscriber:
    """A bounded queue of events. Who does not keep up is dropped; nobody waits for him."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue(_QUEUED_EVENTS)
        self.dropped = asyncio.Event()

    def offer(self, event: Event) -> None:
        """Queue the event, or give the subscriber up."""
        try:
            self.queue.put_nowait(event)
        except asyncio.QueueFull:
            self.dropped.set()


@dataclass(frozen=True)
class EventQuery:
    """Upstream's search: filters, order, page."""

    kind: str | None = None
    command_id: str | None = None
    order_above: int | None = None
    is_descending: bool = False
    limit: int = 100
    page: int | None = None

    def admits(self, event: Event) -> bool:
        """Whether the filters let the event through (those on orders and ids concern outputs only, as upstream)."""
        if self.kind is not None and event.kind != self.kind:
            return False
        if self.command_id is not None and (event.order is None or event.command.id != self.command_id):
            return False
        return self.order_above is None or event.order is None or event.order > self.order_above


class CommandTable:
    """Starts, finds, stops and forgets commands; knows how long nothing has happened.

    Args:
        environment: what commands find in theirs; None: what this process was started with, less what is the server's.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str] | None = None) -> None:
        self._settings = settings
        self._env = dict(environment) if environment is not None else command_environment(settings)
        self._commands: dict[str, Command] = {}
        self._running: dict[str, Command] = {}
        self._ended_bytes: OrderedDict[str, int] = OrderedDict()
        self._kept_bytes = 0
        self._forgotten: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscribers: set[Subscriber] = set()
        self._sequence = itertools.count()
        self._requests = 0
        self._last_activity_s = time.monotonic()

    @property
    def environment(self) -> dict[str, str]:
        """What commands (and git) find in their environment."""
        return dict(self._env)

    @property
    def running(self) -> list[Command]:
        """Commands whose shell has not ended."""
        return list(self._running.values())

    def count_request(self, change: int) -> None:
        """A request with the key began (+1) or ended (-1)."""
        self._requests += change
        self._last_activity_s = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since the last request ended, or the last command; 0 while there is one."""
        # The request that asks is not counted: /server_info needs no key.
        return 0.0 if self._requests or self._running else time.monotonic() - self._last_activity_s

    def start(self, request: CommandRequest) -> Command:
        """Run the request; or, where its id is known, give the command that has it.

        Raises:
            RequestError: 422 for what can't be run; 409 where the id belongs to another command text; 410 where its
                result is no longer kept.
        """
        known = self._commands.get(request.id)
        if known is not None:
            if known.request.command != request.command:
                raise RequestError(f"id {request.id} belongs to another command", 409)
            return known
        if request.id in self._forgotten:
            raise RequestError(f"id {request.id} has run; its result is no longer kept", 410)
        command = self._new_command(request)
        task = command.start(self._env)
        self._commands[command.id] = self._running[command.id] = command
        self._tasks.add(task)
        task.add_done_callback(lambda ended: self._on_command_end(command, ended))
        self._publish(command.events[0])
        return command

    async def end_all(self, *, grace_s: float) -> None:
        """End every running command, because the server ends: TERM, `grace_s`, KILL. Nobody is told a result."""
        for command in self.running:
            command.is_cut_short = True
        families = [command.family for command in self.running if command.family is not None]
        await asyncio.gather(*(end_family(family, grace_s=grace_s) for family in families))

    def get(self, command_id: str) -> Command:
        """The command with that id.

        Raises:
            RequestError: 404: there was none; 410: it has run, and is no longer kept.
        """
        if command_id in self._forgotten:
            raise RequestError(f"id {command_id} has run; its result is no longer kept", 410)
        try:
            return self._commands[command_id]
        except KeyError:
            raise RequestError("there is no such command", 404) from None

    def search(self, query: EventQuery) -> dict[str, Any]:
        """One page of events, and the id of the next page."""
        commands: Iterable[Command] = self._commands.values()
        if query.command_id is not None:
            commands = [command for command in commands if command.id == query.command_id]
        events = [event for command in commands for event in command.events if query.admits(event)]
        events.sort(key=lambda event: event.sequence, reverse=query.is_descending)
        if query.page is not None:
            events = list(itertools.dropwhile(_is_before(query.page, query.is_descending), events))
        rest = events[query.limit :]
        return {
            "items": [event.as_json() for event in events[: query.limit]],
            "next_page_id": str(rest[0].sequence) if rest else None,
        }

    def find_event(self, event_id: str) -> Event | None:
        """The event with that id (a command's first event has the command's id)."""
        for command in self._commands.values():
            for event in command.events:
                if event.id == event_id:
                    return event
        return None

    def clear(self) -> int:
        """Forget all ended commands; returns how many events that were."""
        ended = list(self._ended_bytes)
        count = sum(len(self._commands[command_id].events) for command_id in ended)
        for command_id in ended:
            self._forget(command_id)
        return count

    def subscribe(self) -> Subscriber:
        """A new subscriber for all events from now on."""
        subscriber = Subscriber()
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Take a subscriber away."""
        self._subscribers.discard(subscriber)

    def _new_command(self, request: CommandRequest) -> Command:
        cwd = os.path.normpath(os.path.join(self._settings.working_dir, request.cwd or ""))  # noqa: PTH118 - the caller's own spelling is kept
        if not os.path.isdir(cwd):  # noqa: PTH112 - as above
            raise RequestError(f"cwd {cwd} is not a directory")
        return Command(
            request,
            cwd=cwd,
            spool_dir=self._settings.spool_dir,
            sequence=lambda: next(self._sequence),
            publish=self._publish_later,
        )

    def _publish_later(self, event: Event) -> None:
        # A command that could not be started has never been seen: its first event goes out after the start.
        if event.command.family is not None:
            self._publish(event)

    def _publish(self, event: Event) -> None:
        for subscriber in list(self._subscribers):
            subscriber.offer(event)
            if subscriber.dropped.is_set():
                self._subscribers.discard(subscriber)

    def _on_command_end(self, command: Command, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._last_activity_s = time.monotonic()
        del self._running[command.id]
        self._ended_bytes[command.id] = sum(log.head_size for log in command.logs.values())
        self._kept_bytes += self._ended_bytes[command.id]
        while len(self._ended_bytes) > _KEPT_COMMANDS or (
            self._kept_bytes > _KEPT_BYTES and len(self._ended_bytes) > 1
        ):
            self._forget(next(iter(self._ended_bytes)))
        if not task.cancelled():
            task.result()  # an error here is ours: let the loop report it

    def _forget(self, command_id: str) -> None:
        self._kept_bytes -= self._ended_bytes.pop(command_id)
        self._commands.pop(command_id).discard()
        self._forgotten[command_id] = None
        while len(self._forgotten) > _KEPT_IDS:
            self._forgotten.popitem(last=False)


def _is_before(sequence: int, is_descending: bool) -> "Callable[[Event], bool]":
    return lambda event: (event.sequence > sequence) if is_descending else (event.sequence < sequence)
