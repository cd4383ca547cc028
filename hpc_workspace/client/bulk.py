"""A large body over a connection of its own, read as it comes.

httpx and h11 look at every 64 KiB of a body and copy it three times, which on a node's two CPUs is as much work as the
encryption of SSH. Here the head is read, and then the body's bytes go where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpc_workspace import clock
from hpc_workspace.client.calls import Caller
from hpc_workspace.errors import (
    ServerNotReadyError,
    ServerResponseError,
    ServerUnavailableError,
    TunnelError,
    TunnelLostError,
    WorkspaceError,
)

_PIECE_BYTES = 1024 * 1024
_HEAD_MAX_BYTES = 64 * 1024
_DETAIL_MAX_BYTES = 2000
_SILENCE_S = 60.0
_UNAVAILABLE = 503


class BulkResponse:
    """The answer to a GET, if it is a good one. Its pieces are to be read once.

    Args:
        target: path and query.
        call_began_s: as `Caller.send` takes it.

    Attributes:
        headers: by their names in lower case.

    Raises (`pieces` too):
        ServerResponseError: it is no good one, or none at all.
        ServerNotReadyError, ServerUnavailableError, TunnelError
    """

    def __init__(self, caller: Caller, target: str, call_began_s: float) -> None:
        self._caller = caller
        self._began_s = clock.now_s()
        try:
            self._stream = caller.open_stream(call_began_s)
        except (TunnelError, ServerUnavailableError) as error:
            raise caller.explain(error, self._began_s) from error
        self.headers: dict[str, str] = {}
        self._rest = bytearray()
        try:
            self._ask(target)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BulkResponse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._stream.close()

    def _ask(self, target: str) -> None:
        key = self._caller.http.headers["X-Session-API-Key"]
        asked = f"GET {target} HTTP/1.1\r\nHost: workspace\r\nX-Session-API-Key: {key}\r\nConnection: close\r\n\r\n"
        try:
            self._stream.settimeout(_SILENCE_S)
            self._stream.sendall(asked.encode("ascii"))
        except OSError as error:
            raise self._explained(error) from error
        while (end := self._rest.find(b"\r\n\r\n")) < 0:
            if len(self._rest) > _HEAD_MAX_BYTES or not (data := self._receive()):
                raise self._explained(ConnectionError("it ended before the answer"))
            self._rest += data
        status_line, *lines = self._rest[:end].decode("latin-1").split("\r\n")
        del self._rest[: end + 4]
        try:
            status = int(status_line.split(" ")[1])
            self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            self._left = int(self.headers["content-length"])
        except (IndexError, ValueError, KeyError) as error:
            raise ServerResponseError("GET: the answer is no HTTP.", evidence=repr(status_line)[:200]) from error
        if status != 200:
            self._left = min(self._left, _DETAIL_MAX_BYTES)
            detail = b"".join(self.pieces()).decode("utf-8", "replace")
            refused = ServerResponseError(
                f"GET {target.partition('?')[0]}: the agent server answered {status}.", status=status, evidence=detail
            )
            raise self._caller.explain(refused, self._began_s) if status == _UNAVAILABLE else refused

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes."""
        data = bytes(self._rest[: self._left])
        self._rest.clear()
        while True:
            if data:
                self._left -= len(data)
                if self._left < 0:
                    raise ServerResponseError("GET: the answer is longer than it says.")
                yield data
            if not self._left:
                return
            if not (data := self._receive()):
                raise self._explained(ConnectionError("it ended in the middle of an answer"))

    def _receive(self) -> bytes:
        try:
            return self._stream.recv(min(_PIECE_BYTES, max(getattr(self, "_left", _HEAD_MAX_BYTES), 1)))
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> WorkspaceError:
        """What broke the connection, as one of our errors."""
        if isinstance(error, WorkspaceError):
            return self._caller.explain(error, self._began_s)
        if isinstance(error, TimeoutError):
            return ServerNotReadyError("The agent server stopped in the middle of an answer.", evidence=str(error))
        broke = TunnelLostError("The connection broke in the middle of an answer.", evidence=str(error))
        return self._caller.explain(broke, self._began_s)
