"""/api/bash: run, start, stream, stop and search commands. Shapes as upstream's bash_router 1.58, plus our fields."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hpc_workspace.server.commands import STREAMS, Command
from hpc_workspace.server.output import MEMORY_BYTES
from hpc_workspace.server.requests import CommandRequest, RequestError, parse_command_request, parse_id
from hpc_workspace.server.table import CommandTable, EventQuery

_LONGEST_WAIT_S = 30
_SORT_ORDERS = {"TIMESTAMP": False, "TIMESTAMP_DESC": True}


def bash_routes(table: CommandTable) -> list[Route]:
    """The routes, over one table of commands."""

    async def execute(request: Request) -> Response:
        command = table.start(await read_command_request(request))
        await command.finished.wait()
        if command.is_cut_short:
            raise RequestError("the server is ending, and ended the command", 503)
        return JSONResponse(command.result_json())

    async def start(request: Request) -> Response:
        return JSONResponse(table.start(await read_command_request(request)).as_json())

    async def stream(request: Request) -> Response:
        parsed = await read_command_request(request)
        return CommandStream(table.start(parsed), parsed)

    async def search(request: Request) -> Response:
        return JSONResponse(table.search(_query_of(request)))

    async def event(request: Request) -> Response:
        found = table.find_event(parse_id(request.path_params["event_id"]))
        if found is None:
            raise RequestError("there is no such event", 404)
        return JSONResponse(found.as_json())

    async def stop(request: Request) -> Response:
        command = table.get(parse_id(request.path_params["command_id"]))
        command.request_stop()
        await command.finished.wait()
        return JSONResponse({"success": True})

    async def output(request: Request) -> Response:
        command = table.get(parse_id(request.path_params["command_id"]))
        wait_s, offsets, limit = _place_of(request)
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(command.finished.wait(), wait_s)
        if command.is_cut_short:
            raise RequestError("the server is ending, and ends the command", 503)
        return JSONResponse(command.output_json(offsets, limit))

    async def clear(_: Request) -> Response:
        return JSONResponse({"cleared_count": table.clear()})

    return [
        Route("/api/bash/execute_bash_command", execute, methods=["POST"]),
        Route("/api/bash/start_bash_command", start, methods=["POST"]),
        Route("/api/bash/stream", stream, methods=["POST"]),
        Route("/api/bash/bash_events/search", search, methods=["GET"]),
        Route("/api/bash/bash_events/{event_id}", event, methods=["GET"]),
        Route("/api/bash/bash_commands/{command_id}/stop", stop, methods=["POST"]),
        Route("/api/bash/bash_commands/{command_id}/output", output, methods=["GET"]),
        Route("/api/bash/bash_events", clear, methods=["DELETE"]),
    ]


async def read_command_request(request: Request) -> CommandRequest:
    """The request's JSON body, checked.

    Raises:
        RequestError: 422: it is not JSON, or not a command.
    """
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    return parse_command_request(body)


def _place_of(request: Request) -> tuple[float, dict[str, int], int]:
    """Of a request for output: how long to wait for the end (s), what its reader has, and how much to tell at most."""
    query = request.query_params
    try:
        wait_s = float(query.get("wait_s", 0))
    except ValueError:
        raise RequestError("wait_s must be a number of seconds") from None
    offsets = {name: _integer(query.get(f"{name}_from"), f"{name}_from") or 0 for name in STREAMS}
    limit = _integer(query.get("limit_bytes"), "limit_bytes")
    if not 0 <= wait_s <= _LONGEST_WAIT_S or min(offsets.values()) < 0 or (limit or 0) < 0:
        raise RequestError(f"wait_s must be between 0 and {_LONGEST_WAIT_S}; places and limits are not negative")
    return wait_s, offsets, MEMORY_BYTES if limit is None else min(limit, MEMORY_BYTES)


def _query_of(request: Request) -> EventQuery:
    query = request.query_params
    kind = query.get("kind__eq")
    if kind not in (None, "BashCommand", "BashOutput"):
        raise RequestError(f"kind__eq {kind!r} is neither BashCommand nor BashOutput")
    sort_order = query.get("sort_order", "TIMESTAMP")
    if sort_order not in _SORT_ORDERS:
        raise RequestError(f"sort_order {sort_order!r} is neither TIMESTAMP nor TIMESTAMP_DESC")
    limit = _integer(query.get("limit"), "limit")
    if limit is not None and not 0 < limit <= 100:
        raise RequestError("limit must be between 1 and 100")
    page = _integer(query.get("page_id"), "page_id")
    return EventQuery(
        kind=kind,
        command_id=parse_id(query["command_id__eq"]) if "command_id__eq" in query else None,
        order_above=_integer(query.get("order__gt"), "order__gt"),
        is_descending=_SORT_ORDERS[sort_order],
        limit=limit or 100,
        page=page,
    )


def _integer(text: str | None, name: str) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        raise RequestError(f"{name} {text!r} is not an integer") from None


class CommandStream(Response):
    """NDJSON of a command's output as it comes; a slow reader slows the command.

    Lines: `{"id"}`, then `{"stream", "data_b64"}`, last what `Command.outcome_json` tells. For a command that runs
    already (same id), it begins at the beginning, or behind what the reader says that it has. Without a last line of
    that kind, the server ended before it did.
    """

    def __init__(self, command: Command, request: CommandRequest) -> None:
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]
        self._command = command
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the command or the client has ended."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            if self._request.linger_s is not None:
                self._command.end_when_alone(self._request.linger_s)

    async def _send_all(self, send: Send) -> None:
        async for line in self._lines():
            body = json.dumps(line, separators=(",", ":")).encode() + b"\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[dict[str, object]]:
        yield {"id": self._command.id}
        follower = self._command.follow(stdout=self._request.stdout_from, stderr=self._request.stderr_from)
        try:
            while True:
                pieces = follower.take()
                for name, data in pieces:
                    yield {"stream": name, "data_b64": base64.b64encode(data).decode("ascii")}
                if not pieces and not self._command.is_running:
                    break
                if not pieces:
                    await follower.wait()
        finally:
            self._command.unfollow(follower)
        if not self._command.is_cut_short:
            yield {"kind": "BashOutput", "command_id": self._command.id} | self._command.outcome_json()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
