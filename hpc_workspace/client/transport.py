"""httpx over streams through the door: no TLS context, no proxy, no redirect to anywhere else.

What goes wrong on the way comes out as httpx's errors, whose user need not know of httpcore; what the way itself can
say of it, as ours. `calls` makes our errors of all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpcore
import httpx

from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import TunnelError, WorkspaceError

_SERVER_ERROR = 500
# The two libraries have the same names for the same things.
_NAMES = (
    *("ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout"),
    *("ConnectError", "ReadError", "WriteError", "LocalProtocolError", "RemoteProtocolError"),
)
_AS_HTTPX: dict[type[Exception], type[httpx.TransportError]] = {
    getattr(httpcore, name): getattr(httpx, name) for name in _NAMES
}


@contextlib.contextmanager
def _httpx_errors(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except tuple(_AS_HTTPX) as error:
        raise _AS_HTTPX[type(error)](str(error), request=request) from error


class _HttpStream(httpcore.NetworkStream):
    """A stream through the door, as httpcore wants one."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            self._stream.settimeout(timeout)
            return self._stream.recv(max_bytes)
        except WorkspaceError:
            raise  # some are ConnectionErrors too, and say what happened better than we could
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self._stream.settimeout(timeout)
            self._stream.sendall(buffer)
        except WorkspaceError:
            raise
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.is_readable() if info == "is_readable" else None


class NotSentError(httpx.ConnectError):
    """There was no connection, and nothing was sent; `reason` says why."""

    def __init__(self, reason: WorkspaceError) -> None:
        self.reason = reason
        super().__init__(str(reason))


class _DoorBackend(httpcore.NetworkBackend):
    """httpcore's network, in which every address is the agent server behind the door."""

    def __init__(self, dial: Callable[[], Stream]) -> None:
        self._dial = dial

    def connect_tcp(self, host: str, port: int, *args: object, **options: object) -> httpcore.NetworkStream:
        try:
            return _HttpStream(self._dial())
        except TunnelError as error:
            raise NotSentError(error) from error


class DoorTransport(httpx.BaseTransport):
    """httpx over a pool of streams through the door: no TLS context, no proxy, no redirect to anywhere else."""

    def __init__(self, dial: Callable[[], Stream], keepalive_s: float) -> None:
        self._pool = httpcore.ConnectionPool(
            max_connections=None,
            max_keepalive_connections=16,
            keepalive_expiry=keepalive_s,
            network_backend=_DoorBackend(dial),
            ssl_context=_no_tls(),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.SyncByteStream)
        asked = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=request.url.raw_scheme,
                host=request.url.raw_host,
                port=request.url.port,
                target=request.url.raw_path,
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _httpx_errors(request):
            answer = self._pool.handle_request(asked)
        body = _Body(answer, request, is_last=answer.status >= _SERVER_ERROR)
        return httpx.Response(answer.status, headers=answer.headers, stream=body, extensions=answer.extensions)

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    """An answer's body. With `is_last` no other request goes over its connection.

    After an error of its own, OpenHands' server (1.58) closes the connection some seconds later, under the next
    request.
    """

    def __init__(self, answer: httpcore.Response, request: httpx.Request, *, is_last: bool) -> None:
        self._answer = answer
        self._request = request
        self._is_last = is_last

    def __iter__(self) -> Iterator[bytes]:
        assert not isinstance(self._answer.stream, bytes)
        with _httpx_errors(self._request):
            yield from self._answer.iter_stream()

    def close(self) -> None:
        if self._is_last:
            self._answer.extensions["network_stream"].close()
        self._answer.close()


def _no_tls() -> Any:
    # httpcore builds a default context (22 ms) if it gets none; this one is never used, the door speaks plain HTTP.
    import ssl

    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
