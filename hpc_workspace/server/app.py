"""The routes: OpenHands' paths and shapes, and a few of our own (`/api/bash/stream`, `/api/file/raw`)."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from hpc_workspace.server import files, git
from hpc_workspace.server.auth import KeyCheck
from hpc_workspace.server.commands import Command, Follower
from hpc_workspace.server.requests import CommandRequest, RequestError, parse_command_request, parse_id
from hpc_workspace.server.settings import Settings
from hpc_workspace.server.table import CommandTable, EventQuery
from hpc_workspace.version import __version__

CAPABILITIES = ("float_timeout", "client_command_id", "stream", "raw_upload", "env", "byte_exact")
_TOO_SLOW = 1013  # RFC 6455 registry: try again later
_PAGE_MAX = 100


def make_app(settings: Settings, table: CommandTable) -> KeyCheck:
    """The server as an ASGI application, behind its key check."""
    bash = _Bash(table)
    started_s = time.monotonic()

    def server_info(_: Request) -> JSONResponse:
        return JSONResponse(
            {
                "title": "hpc-workspace agent server",
                "version": __version__,
                "python_version": sys.version,
                "uptime": time.monotonic() - started_s,
                "idle_time": table.idle_s(),
                "running_commands": len(table.running),
                "capabilities": list(CAPABILITIES),
            }
        )

    routes = [
        Route("/health", _ok),
        Route("/alive", _ok),
        Route("/ready", _ready),
        Route("/server_info", server_info),
        Route("/api/bash/execute_bash_command", bash.execute, methods=["POST"]),
        Route("/api/bash/start_bash_command", bash.start, methods=["POST"]),
        Route("/api/bash/stream", bash.stream, methods=["POST"]),
        Route("/api/bash/bash_events/search", bash.search),
        Route("/api/bash/bash_events", bash.clear, methods=["DELETE"]),
        Route("/api/bash/bash_events/{event_id}", bash.event),
        Route("/api/bash/bash_commands/{command_id}/stop", bash.stop, methods=["POST"]),
        WebSocketRoute("/sockets/bash-events", bash.socket),
        *files.routes(),
        *git.routes(table.environment),
    ]
    app = Starlette(routes=routes, exception_handlers={RequestError: _refuse})
    return KeyCheck(app, keys=settings.session_api_keys, on_request=table.count_request)


def _ok(_: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


def _ready(_: Request) -> JSONResponse:
    return JSONResponse({"status": "ready"})


def _refuse(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=error.status if isinstance(error, RequestError) else 500)


async def _command_request(request: Request) -> CommandRequest:
    try:
        return parse_command_request(json.loads(await request.body()))
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


class _Bash:
    """Everything below /api/bash, and the socket of its events."""

    def __init__(self, table: CommandTable) -> None:
        self._table = table

    async def execute(self, request: Request) -> Response:
        command = self._table.start(await _command_request(request))
        await command.finished.wait()
        return JSONResponse(command.result_json())

    async def start(self, request: Request) -> Response:
        return JSONResponse(self._table.start(await _command_request(request)).as_json())

    async def stream(self, request: Request) -> Response:
        wanted = await _command_request(request)
        command = self._table.start(wanted)
        return StreamingResponse(
            _ndjson(command, command.follow(), kill=wanted.kill_on_disconnect), media_type="application/x-ndjson"
        )

    async def search(self, request: Request) -> Response:
        return JSONResponse(self._table.search(_event_query(request)))

    async def event(self, request: Request) -> Response:
        event = self._table.find_event(parse_id(request.path_params["event_id"]))
        if event is None:
            raise RequestError("there is no such event", 404)
        return JSONResponse(event.as_json())

    async def clear(self, _: Request) -> Response:
        return JSONResponse({"cleared_count": self._table.clear()})

    async def stop(self, request: Request) -> Response:
        command = self._table.get(parse_id(request.path_params["command_id"]))
        if command is None:
            raise RequestError("there is no such command", 404)
        command.request_stop()
        return JSONResponse({"success": True})

    async def socket(self, socket: WebSocket) -> None:
        await socket.accept()
        subscriber = self._table.subscribe()
        tasks = {
            asyncio.create_task(self._send_events(socket, subscriber.queue)),
            asyncio.create_task(self._receive_commands(socket)),
            asyncio.create_task(subscriber.dropped.wait()),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if subscriber.dropped.is_set():
                await socket.close(_TOO_SLOW, "too slow")
        finally:
            self._table.unsubscribe(subscriber)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_events(self, socket: WebSocket, queue: asyncio.Queue[Any]) -> None:
        while True:
            await socket.send_json((await queue.get()).as_json())

    async def _receive_commands(self, socket: WebSocket) -> None:
        while True:
            try:
                self._table.start(parse_command_request(await socket.receive_json()))
            except WebSocketDisconnect:
                return
            except (RequestError, ValueError) as error:
                await socket.send_json({"kind": "BashError", "code": type(error).__name__, "detail": str(error)})


async def _ndjson(command: Command, follower: Follower, *, kill: bool) -> AsyncIterator[bytes]:
    """A command's output as lines of JSON, the result last. Being closed early means that nobody reads any more."""
    complete = False
    try:
        yield _line({"id": command.id})
        while True:
            ended = not command.is_running
            for name, data in follower.take():
                yield _line({"stream": name, "data_b64": base64.b64encode(data).decode("ascii")})
                ended = False
            if ended:
                break
            if command.is_running:
                await follower.wait()
        yield _line({"kind": "BashOutput", "command_id": command.id} | command.outcome_json())
        complete = True
    finally:
        command.unfollow(follower)
        if kill and not complete:
            command.request_stop()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _event_query(request: Request) -> EventQuery:
    said = request.query_params
    try:
        limit = int(said.get("limit", _PAGE_MAX))
        order = int(said["order__gt"]) if "order__gt" in said else None
        page = str(int(said["page_id"])) if said.get("page_id") else None
    except ValueError as error:
        raise RequestError(f"limit, order__gt and page_id are numbers: {error}") from error
    if not 0 < limit <= _PAGE_MAX:
        raise RequestError(f"limit must be from 1 to {_PAGE_MAX}")
    return EventQuery(
        kind=said.get("kind__eq"),
        command_id=parse_id(said["command_id__eq"]) if "command_id__eq" in said else None,
        order_above=order,
        is_descending=said.get("sort_order") == "TIMESTAMP_DESC",
        limit=limit,
        page_id=page,
    )
