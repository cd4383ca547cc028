"""The key check. Everything needs the key, except the four paths that say only that a server is there.

It stands before the routes, so that a route added later is shut unless someone opens it here.
"""

import hmac
from collections.abc import Callable, Sequence
from urllib.parse import parse_qs

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/alive", "/ready", "/server_info"})
_HEADER = b"x-session-api-key"


class KeyCheck:
    """ASGI middleware: 401 without a right key; counts the requests that have one.

    Args:
        on_request: called with +1 when a request with the right key begins, and -1 when it ends.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], on_request: Callable[[int], None]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._on_request = on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
        elif not self._is_right(_presented_key(scope)):
            await _refuse(scope, receive, send)
        elif scope["type"] == "websocket":  # an open socket is not activity; the commands it starts are
            await self._app(scope, receive, send)
        else:
            self._on_request(1)
            try:
                await self._app(scope, receive, send)
            finally:
                self._on_request(-1)

    def _is_right(self, presented: bytes | None) -> bool:
        if presented is None:
            return False
        # Every key is compared, so that the time taken does not tell which one was near.
        return any([hmac.compare_digest(presented, key) for key in self._keys])  # noqa: C419 - no short cut: the time must not tell


def _presented_key(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == _HEADER:
            return bytes(value)
    if scope["type"] == "websocket":  # browsers can't set headers on a WebSocket
        query = parse_qs(scope["query_string"].decode("latin-1"))
        values = query.get("session_api_key", [])
        return values[0].encode() if values else None
    return None


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    response = JSONResponse({"detail": "X-Session-API-Key is missing or wrong"}, status_code=401)
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 4001, "reason": "key is missing or wrong"})
        return
    await response(scope, receive, send)
