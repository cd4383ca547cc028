"""/sockets/bash-events: all events as they come, and commands started by message. Shape as upstream's 1.58.

A subscriber who does not read is closed with code 1013 once 256 events wait for him; commands never wait for him.
"""

import asyncio
import contextlib
import uuid
from typing import Any

from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from hpc_workspace.server.commands import now_text
from hpc_workspace.server.requests import RequestError, parse_command_request
from hpc_workspace.server.table import CommandTable, EventQuery, Subscriber

_CLOSE_S = 2.0


def socket_routes(table: CommandTable) -> list[WebSocketRoute]:
    """The one WebSocket route."""

    async def bash_events(websocket: WebSocket) -> None:
        await websocket.accept()
        subscriber = table.subscribe()
        tasks = [
            asyncio.create_task(_send_events(websocket, table, subscriber)),
            asyncio.create_task(_receive_commands(websocket, table)),
            asyncio.create_task(subscriber.dropped.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            table.unsubscribe(subscriber)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if subscriber.dropped.is_set() and websocket.application_state is WebSocketState.CONNECTED:
            with contextlib.suppress(TimeoutError, RuntimeError, WebSocketDisconnect):
                async with asyncio.timeout(_CLOSE_S):
                    await websocket.close(1013, "events were not read fast enough")

    return [WebSocketRoute("/sockets/bash-events", bash_events)]


async def _send_events(websocket: WebSocket, table: CommandTable, subscriber: Subscriber) -> None:
    if websocket.query_params.get("resend_mode") == "all":
        await _send_history(websocket, table)
    while True:
        event = await subscriber.queue.get()
        await websocket.send_json(event.as_json())


async def _send_history(websocket: WebSocket, table: CommandTable) -> None:
    page: int | None = None
    while True:
        answer = table.search(EventQuery(page=page))
        for item in answer["items"]:
            await websocket.send_json(item)
        if answer["next_page_id"] is None:
            return
        page = int(answer["next_page_id"])


async def _receive_commands(websocket: WebSocket, table: CommandTable) -> None:
    while True:
        try:
            message = await websocket.receive_json()
        except (ValueError, KeyError) as error:  # not JSON; a binary frame
            await websocket.send_json(_error_event("ValueError", f"the message is not JSON text: {error}"))
            continue
        if isinstance(message, dict) and message.get("type") == "auth":
            continue  # upstream's clients may send their key once more as the first message
        try:
            table.start(parse_command_request(message))
        except RequestError as error:
            await websocket.send_json(_error_event("RequestError", str(error)))


def _error_event(code: str, detail: str) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "timestamp": now_text(), "kind": "BashError", "code": code, "detail": detail}
