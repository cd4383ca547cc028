"""httpx over streams through the door: no TLS context, no proxy, no redirect to anywhere else.

What goes wrong here comes out as httpcore has it; `calls` makes our errors of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpcore
import httpx

from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import TunnelError, WorkspaceError

_SERVER_ERROR = 500


class _HttpStream(httpcore.NetworkStream):
    """A stream through the door, as httpcore wants one."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._stream.settimeout(timeout)
        try:
            return self._stream.recv(max_bytes)
        except WorkspaceError:
            raise  # some are ConnectionErrors too, and say what happened better than we could
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.settimeout(timeout)
        try:
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


class NotSentError(Exception):
    """There was no connection, and nothing was sent; `reason` says why."""

    def __init__(self, reason: WorkspaceError) -> None:
        self.reason = reason
        super().__init__(reason)


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
        answer = self._pool.handle_request(
            httpcore.Request(
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
        )
        body = _Body(answer, is_last=answer.status >= _SERVER_ERROR)
        return httpx.Response(answer.status, headers=answer.headers, stream=body, extensions=answer.extensions)

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    """An answer's body. With `is_last` no other request goes over its connection.

    After an error of its own, OpenHands' server (1.58) closes the connection some seconds later, under the next
    request.
    """

    def __init__(self, answer: httpcore.Response, *, is_last: bool) -> None:
        self._answer = answer
        self._is_last = is_last

    def __iter__(self) -> Iterator[bytes]:
        assert not isinstance(self._answer.stream, bytes)
        yield from self._answer.iter_stream()

    def close(self) -> None:
        if self._is_last:
            self._answer.extensions["network_stream"].close()
        self._answer.close()


def _no_tls() -> Any:
    # httpcore builds a default context (22 ms) if it gets none; this one is never used, the door speaks plain HTTP.
    import ssl

    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
