"""One request and its answer: sent, sent again when the connection broke and that is safe, and read to its end.

Whatever can go wrong between here and the agent server comes out as one of our errors.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import httpx

from hpc_workspace import clock
from hpc_workspace.client.transport import DoorTransport, NotSentError
from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import (
    AuthError,
    ContainerError,
    HostKeyError,
    ServerNotReadyError,
    ServerResponseError,
    ServerUnavailableError,
    TunnelError,
    TunnelLostError,
    WorkspaceError,
)
from hpc_workspace.exchange import Wish

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 60.0
# uvicorn drops an idle connection after 5 s (its default, which OpenHands' server keeps); leave well before it does.
_KEEPALIVE_S = {"bundled": 45.0, "image": 2.5}
_UNAVAILABLE = 503
# How long a call tries again after its connection broke: an sshd restarts in seconds, a switch in a minute.
_HEAL_S = 90.0
_TRIES_S = (0.05, 2.0)
# A try that goes on for so long was through: longer than it takes to find that there is no way.
_LASTED_S = 30.0
# A server that hangs up on the same request again and again does not get better.
_BREAKS_MAX = 5


class Way(Protocol):
    """The way to the agent server, through whatever becomes of it.

    `dial` gives a new stream for a call that began then (`clock.now_s`). `explain` is given the error of a broken
    connection and when the try began that it broke, and gives it back, or one that says what broke it. `restart_since`
    is that the life of the workspace in which a call began is over and another has begun; else None.
    """

    def dial(self, wish: Wish, call_began_s: float = ..., /) -> Stream: ...
    def explain(self, error: WorkspaceError, since_s: float, /) -> WorkspaceError: ...
    def restart_since(self, call_began_s: float, /) -> WorkspaceError | None: ...


class AtOnce:
    """A way that waits for nothing: neither for an explanation nor for a job that is requeued.

    Args:
        dial: gives a new stream for a wish.
    """

    def __init__(self, dial: Callable[[Wish], Stream]) -> None:
        self._dial = dial

    def dial(self, wish: Wish, call_began_s: float = math.inf) -> Stream:
        """A stream. Raises: ContainerError: there is no way now."""
        try:
            return self._dial(wish)
        except TunnelError as error:
            raise ContainerError(error.what, evidence=error.evidence) from error

    def explain(self, error: WorkspaceError, since_s: float) -> WorkspaceError:
        """`error`, as one that nobody tries again after."""
        return ContainerError(error.what, evidence=error.evidence)

    def restart_since(self, call_began_s: float) -> None:
        """Nothing is known of that."""


class Patience:
    """How long one call tries again after its connection broke. What can't pass by itself is not waited for."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """It goes on: the next break has all the time again."""
        self._deadline: clock.Deadline | None = None
        self._breaks = 0
        self._pauses_s = clock.pauses_s(*_TRIES_S)

    def wait(self, error: WorkspaceError, began_s: float) -> None:
        """Wait a little, before the next try.

        Args:
            began_s: when the try began that broke; after one that lasted, the next has all the time again.

        Raises:
            WorkspaceError: `error`, if there is to be none.
        """
        if clock.now_s() - began_s > _LASTED_S:
            self.renew()
        self._deadline = self._deadline or clock.Deadline(_HEAL_S)
        self._breaks += _is_hang_up(error)
        may_pass = isinstance(error, (TunnelError, ServerUnavailableError))
        if isinstance(error, (AuthError, HostKeyError)) or not may_pass:
            raise error
        if self._breaks > _BREAKS_MAX or self._deadline.is_over:
            raise error
        log.info("trying again: %s", error.what)
        clock.sleep(next(self._pauses_s))


def _is_hang_up(error: WorkspaceError) -> bool:
    """Whether the server may have hung up on this request; the whole way can break any number of times.

    With pam_slurm_adopt, for one, each login is cut that a job adopts which is ending.
    """
    if isinstance(error, TunnelLostError):
        return not error.is_way_made_anew
    return isinstance(error, ServerUnavailableError)


class Caller:
    """Sends requests to one agent server.

    A call whose connection breaks is sent again over a new one, for 90 s, if it does the same thing twice or the server
    tells a repetition by its id: no command is ever run twice.

    Args:
        way: to the server, through the door.
        api_key: goes out with every request, through proven doors only.
        server: which of the two kinds it is.
        working_dir: where commands start and relative paths begin.
    """

    def __init__(
        self,
        way: Way,
        *,
        api_key: str,
        server: Literal["bundled", "image"],
        working_dir: str,
    ) -> None:
        self._way = way
        self.explain = way.explain
        # When the call of each thread began: it must not go on in a life that began later.
        self._call = threading.local()
        self.is_bundled = server == "bundled"
        self.working_dir = working_dir
        self.http = httpx.Client(
            transport=DoorTransport(self._dial, _KEEPALIVE_S[server]),
            base_url="http://workspace",
            headers={"X-Session-API-Key": api_key},
            timeout=httpx.Timeout(_ANSWER_TIMEOUT_S),
            trust_env=False,
        )

    def close(self) -> None:
        """Close its connections."""
        self.http.close()

    def _dial(self) -> Stream:
        return self._way.dial(Wish(want="server"), getattr(self._call, "began_s", math.inf))

    def open_stream(self, call_began_s: float) -> Stream:
        """A connection to the server of one's own. Raises: as `Way.dial`."""
        return self._way.dial(Wish(want="server"), call_began_s)

    def absolute(self, path: str) -> str:
        """`path` as the workspace sees it; relative ones begin at its `working_dir`."""
        return path if path.startswith("/") else f"{self.working_dir.rstrip('/')}/{path}"

    def json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The object that a request is answered with; as `send`."""
        answer = self.any_json(method, path, **options)
        if not isinstance(answer, dict):
            raise ServerResponseError(f"{method} {path}: the answer is not an object.", evidence=repr(answer)[:500])
        return answer

    def any_json(self, method: str, path: str, **options: Any) -> Any:
        """What a request is answered with, as JSON; as `send`."""
        return parse_json(self.send(method, path, **options).content)

    def send(
        self,
        method: str,
        path: str,
        *,
        is_streamed: bool = False,
        is_repeatable: bool = True,
        content_of: Callable[[], dict[str, Any]] = dict,
        call_began_s: float | None = None,
        answer_timeout_s: float | None = _ANSWER_TIMEOUT_S,
        **options: Any,
    ) -> httpx.Response:
        """The answer to a request, if it is a good one.

        Args:
            is_streamed: its body is read by the caller, who closes it.
            is_repeatable: it may be sent again when the connection broke after a part of it was sent.
            content_of: makes the request's body, once for each time that it is sent.
            call_began_s: when the call began that this is a part of; None: now.
            answer_timeout_s: how long the server may say nothing; None: for ever.
            options: as `httpx.Client.build_request` takes them.

        Raises:
            ServerNotReadyError, ServerUnavailableError, ServerResponseError, TunnelError
        """
        patience = Patience()
        call_began_s = clock.now_s() if call_began_s is None else call_began_s
        while True:
            began_s = clock.now_s()
            timeout = httpx.Timeout(_ANSWER_TIMEOUT_S, read=answer_timeout_s)
            request = self.http.build_request(method, path, timeout=timeout, **options, **content_of())
            self._call.began_s = call_began_s
            try:
                return self._send_once(request, began_s, is_streamed=is_streamed)
            except NotSentError as error:
                patience.wait(error.reason, began_s)
            except (TunnelError, ServerUnavailableError) as error:
                if not is_repeatable:
                    raise
                patience.wait(error, began_s)
            finally:
                self._call.began_s = math.inf
            if (restarted := self._way.restart_since(call_began_s)) is not None:
                raise restarted

    def _send_once(self, request: httpx.Request, began_s: float, *, is_streamed: bool) -> httpx.Response:
        what = f"{request.method} {request.url.path}"
        try:
            response = self.http.send(request, stream=is_streamed)
        except NotSentError as error:
            found = self.explain(error.reason, began_s)
            if not isinstance(found, TunnelError):
                raise found from error.reason
            raise NotSentError(found) from error
        except httpx.TimeoutException as error:
            raise ServerNotReadyError(
                f"{what}: the agent server did not answer in time.", evidence=str(error)
            ) from error
        except httpx.RemoteProtocolError as error:
            hung_up = TunnelLostError(f"{what}: the connection ended before the answer.", evidence=str(error))
            raise self.explain(hung_up, began_s) from error
        except httpx.NetworkError as error:
            broke = TunnelLostError(f"{what}: the connection broke.", evidence=str(error))
            raise self.explain(broke, began_s) from error
        except (TunnelError, ServerUnavailableError) as error:  # of a stream's first bytes
            raise self.explain(error, began_s) from error.__cause__
        if response.is_success:
            return response
        try:
            detail = b"".join(self.guarded(response.iter_bytes(), began_s))[:2000].decode("utf-8", "replace")
        finally:
            response.close()
        refused = _response_error(what, response.status_code, detail)
        raise self.explain(refused, began_s) if response.status_code == _UNAVAILABLE else refused

    def guarded(self, pieces: Iterator[bytes], began_s: float) -> Iterator[bytes]:
        """`pieces`, with what can break while a body is read as one of our errors.

        Args:
            began_s: when the call began.
        """
        try:
            yield from pieces
        except httpx.TimeoutException as error:
            raise ServerNotReadyError(
                "The agent server stopped in the middle of an answer.", evidence=str(error)
            ) from error
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            broke = TunnelLostError("The connection broke in the middle of an answer.", evidence=str(error))
            raise self.explain(broke, began_s) from error
        except (TunnelError, ServerUnavailableError) as error:  # of our own streams
            raise self.explain(error, began_s) from error.__cause__


def parse_json(data: bytes) -> Any:
    """The value. Raises: ServerResponseError: it is none."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise ServerResponseError("The agent server's answer is not JSON.", evidence=repr(data[:200])) from error


def _response_error(what: str, status: int, detail: str) -> ServerResponseError:
    remedy = "Its key has changed: attach to the workspace anew." if status in (401, 403) else ""
    return ServerResponseError(
        f"{what}: the agent server answered {status}.", status=status, evidence=detail, remedy=remedy
    )
