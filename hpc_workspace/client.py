"""The agent server's REST API, spoken through the door. The only module that uses httpx and httpcore.

Both servers speak the paths of OpenHands' agent server (1.58). What only the bundled server has (a command's own id,
float time-outs, streaming, raw transfers, exact bytes) is used where `server` says that it is the bundled one.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import math
import os
import secrets
import shlex
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import httpcore
import httpx

from hpc_workspace import clock
from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import (
    AuthError,
    CommandError,
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
from hpc_workspace.results import CommandResult, FileOperationResult, GitChange, GitDiff, OutputChunk

log = logging.getLogger(__name__)

# uvicorn drops an idle connection after 5 s (its default, which OpenHands' server keeps); leave well before it does.
_KEEPALIVE_S = {"bundled": 45.0, "image": 2.5}
_ANSWER_TIMEOUT_S = 60.0
_GRACE_S = 15.0
_UNPROCESSABLE = 422
_UNAVAILABLE = 503
_SERVER_ERROR = 500
_COPY_BYTES = 1024 * 1024
_POLLS_S = (0.01, 0.25)
# How long a call tries again after its connection broke: an sshd restarts in seconds, a switch in a minute.
_HEAL_S = 90.0
_TRIES_S = (0.05, 2.0)
# A try that goes on for so long was through: longer than it takes to find that there is no way.
_LASTED_S = 30.0
# A server that hangs up on the same request again and again does not get better.
_BREAKS_MAX = 5
# How long a streamed command goes on alone: longer than its reader tries to come back.
_LINGER_S = 120.0
# How long after a broken connection a request that it carried may still turn up at the server.
_TURN_UP_S = 2.0


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


class _NotSentError(Exception):
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
            raise _NotSentError(error) from error


class _DoorTransport(httpx.BaseTransport):
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


class _Patience:
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
        self._breaks += isinstance(error, (TunnelLostError, ServerUnavailableError))
        may_pass = isinstance(error, (TunnelError, ServerUnavailableError))
        if isinstance(error, (AuthError, HostKeyError)) or not may_pass:
            raise error
        if self._breaks > _BREAKS_MAX or self._deadline.is_over:
            raise error
        log.info("trying again: %s", error.what)
        clock.sleep(next(self._pauses_s))


class AgentServerClient:
    """Commands, files, git and health of one agent server.

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
        self._explain = way.explain
        # When the call of each thread began: it must not go on in a life that began later.
        self._call = threading.local()
        self._is_bundled = server == "bundled"
        self._working_dir = working_dir
        self.http = httpx.Client(
            transport=_DoorTransport(self._dial, _KEEPALIVE_S[server]),
            base_url="http://workspace",
            headers={"X-Session-API-Key": api_key},
            timeout=httpx.Timeout(_ANSWER_TIMEOUT_S),
            trust_env=False,
        )

    def close(self) -> None:
        self.http.close()

    def _dial(self) -> Stream:
        return self._way.dial(Wish(want="server"), getattr(self._call, "began_s", math.inf))

    def health(self) -> dict[str, Any]:
        """What the server says of itself: title, version, uptime, idle_time (seconds) and more.

        Raises:
            ServerError, TunnelError: it does not answer, or not sensibly.
        """
        return self._json("GET", "/server_info")

    def execute(self, command: str, *, cwd: str | None, timeout_s: float, env: dict[str, str] | None) -> CommandResult:
        """Run a command to its end; see `Workspace.execute_command`."""
        body = self._command_body(command, cwd, timeout_s, env)
        began_s = clock.now_s()
        with _command_errors(command):
            try:
                answer = self._json(
                    "POST",
                    "/api/bash/execute_bash_command",
                    json=body,
                    timeout_s=timeout_s + _GRACE_S,
                    is_repeatable=self._is_bundled,
                )
            except TunnelLostError as error:
                answer = self._find_result(command, body["command"], error)
        return self._as_result(command, answer, timeout_s, clock.now_s() - began_s)

    def _find_result(self, command: str, sent: str, broke: TunnelLostError) -> dict[str, Any]:
        """The result of a command whose connection broke, from a server that knows no ids of ours: by its text.

        Raises:
            CommandError: it may or may not have reached the server.
            TunnelLostError: the way is not mended in time.
        """
        if self._is_bundled:
            raise broke
        deadline = clock.Deadline(_TURN_UP_S)
        params = {"kind__eq": "BashCommand", "sort_order": "TIMESTAMP_DESC"}
        for pause_s in clock.pauses_s(*_POLLS_S):
            page = self._json("GET", "/api/bash/bash_events/search", params=params)
            for event in page["items"]:
                if event.get("command") == sent:
                    return self._collect(str(event["id"]))
            if deadline.is_over:
                break
            clock.sleep(pause_s)
        raise CommandError(
            "The connection broke, and the agent server does not know the command: it may or may not run yet.",
            command=command,
            evidence=broke.evidence,
        ) from broke

    def _collect(self, command_id: str) -> dict[str, Any]:
        """All that a command prints until it ends, and its exit code, as a server that streams nothing tells it."""
        said = {"stdout": "", "stderr": ""}
        for event in self._outputs(command_id):
            for name in said:
                said[name] += event.get(name) or ""
            if event.get("exit_code") is not None:
                return event | said
        raise AssertionError("outputs end with an exit code")

    def _outputs(self, command_id: str) -> Iterator[dict[str, Any]]:
        """The output events of a command, in order, as they come; the last one has its exit code."""
        order = -1
        for pause_s in clock.pauses_s(*_POLLS_S):
            params = {"command_id__eq": command_id, "kind__eq": "BashOutput", "order__gt": str(order)}
            page = self._json("GET", "/api/bash/bash_events/search", params=params)
            for event in page["items"]:
                order = max(order, int(event["order"]))
                yield event
                if event.get("exit_code") is not None:
                    return
            clock.sleep(pause_s)

    def stream(
        self, command: str, *, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None
    ) -> Iterator[OutputChunk | CommandResult]:
        """A command's output as it comes, then its result, whose `stdout` and `stderr` are empty."""
        if not self._is_bundled:
            yield from self._poll(command, cwd, timeout_s, env)
            return
        body = self._command_body(command, cwd, timeout_s, env) | {"linger_s": _LINGER_S}
        read_timeout = None if timeout_s is None else timeout_s + _GRACE_S
        patience = _Patience()
        call_began_s = clock.now_s()
        has_ended = False
        try:
            while not has_ended:
                began_s = clock.now_s()
                try:
                    for item in self._stream_on(command, body, read_timeout, call_began_s):
                        patience.renew()
                        has_ended = isinstance(item, CommandResult)
                        if isinstance(item, OutputChunk):
                            body[f"{item.stream}_from"] = body.get(f"{item.stream}_from", 0) + len(item.data)
                        yield item
                except (TunnelError, ServerUnavailableError) as error:
                    patience.wait(error, began_s)
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            self._stop(body["id"])
            raise

    def _stream_on(
        self, command: str, body: dict[str, Any], read_timeout: float | None, call_began_s: float
    ) -> Iterator[OutputChunk | CommandResult]:
        """The rest of a stream, from where `body` says; the last item is the result.

        Raises:
            ServerUnavailableError: it broke off before.
        """
        began_s = clock.now_s()
        timeout = httpx.Timeout(_ANSWER_TIMEOUT_S, read=read_timeout)
        with _command_errors(command):
            response = self._send(
                "POST", "/api/bash/stream", json=body, timeout=timeout, is_streamed=True, call_began_s=call_began_s
            )
        try:
            for line in _lines(self._guarded(response.iter_raw(), began_s)):
                event = _parse_json(line)
                if "data_b64" in event:
                    yield OutputChunk(stream=event["stream"], data=base64.b64decode(event["data_b64"]))
                elif "exit_code" in event:
                    yield CommandResult(
                        command=command,
                        exit_code=int(event["exit_code"]),
                        timeout_occurred=bool(event.get("timeout_occurred")),
                    )
                    return
            cut = ServerUnavailableError("The stream of a command ended before the command did.")
            raise self._explain(cut, began_s)
        finally:
            response.close()

    def _stop(self, command_id: str) -> None:
        """End a command that nobody wants any more. If that can't be told, the server ends it by itself later."""
        with contextlib.suppress(WorkspaceError):
            self._send("POST", f"/api/bash/bash_commands/{command_id}/stop", is_repeatable=False)

    def _poll(
        self, command: str, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None
    ) -> Iterator[OutputChunk | CommandResult]:
        """OpenHands' server streams nothing below 1 MiB: ask for what there is until there is an exit code."""
        body = self._command_body(command, cwd, 86400.0 if timeout_s is None else timeout_s, env)
        began_s = clock.now_s()
        started = self._json("POST", "/api/bash/start_bash_command", json=body, is_repeatable=False)
        for event in self._outputs(str(started["id"])):
            for name in ("stdout", "stderr"):
                if event.get(name):
                    yield OutputChunk(stream=name, data=event[name].encode("utf-8", "surrogateescape"))
            if event.get("exit_code") is not None:
                result = self._as_result(command, event, timeout_s or math.inf, clock.now_s() - began_s)
                yield result.model_copy(update={"stdout": "", "stderr": ""})

    def upload(self, source: Path, destination: str) -> FileOperationResult:
        """Copy a file of ours into the workspace, with its mode; memory does not grow with its size."""
        path = self._absolute(destination)
        found = source.stat()
        with source.open("rb") as file:
            if self._is_bundled:
                params = {"path": path, "mode": f"{found.st_mode & 0o777:04o}", "mtime": repr(found.st_mtime)}
                self._put(file, found.st_size, params)
            else:
                self._upload_form(file, path)
                self.execute(f"chmod {found.st_mode & 0o777:04o} {shlex.quote(path)}", cwd="/", timeout_s=30, env=None)
        return FileOperationResult(source_path=str(source), destination_path=path, file_size=found.st_size)

    def write(self, data: bytes, destination: str, mode: int) -> FileOperationResult:
        """Put bytes into a file of the workspace."""
        path = self._absolute(destination)
        if self._is_bundled:
            # In pieces: one large buffer is sliced anew for every packet further down.
            self._put(io.BytesIO(data), len(data), {"path": path, "mode": f"{mode:04o}"})
        else:
            self._upload_form(io.BytesIO(data), path)
        return FileOperationResult(source_path="", destination_path=path, file_size=len(data))

    def _put(self, file: BinaryIO, size: int, params: dict[str, str]) -> None:
        def content() -> dict[str, Any]:
            file.seek(0)
            return {"content": _chunks(file)}

        self._send("PUT", "/api/file/raw", params=params, headers={"Content-Length": str(size)}, content_of=content)

    def _upload_form(self, file: BinaryIO, path: str) -> None:
        def content() -> dict[str, Any]:
            file.seek(0)
            return {"files": {"file": ("upload", file)}}

        self._send("POST", "/api/file/upload", params={"path": path}, content_of=content)

    def download(self, source: str, destination: Path) -> FileOperationResult:
        """Copy a file of the workspace to ours, whole or not at all, with its mode where the server tells it."""
        path = self._absolute(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        patience = _Patience()
        call_began_s = clock.now_s()
        while True:
            began_s = clock.now_s()
            try:
                size = self._download_once(path, destination, call_began_s)
            except (TunnelError, ServerUnavailableError) as error:
                patience.wait(error, began_s)
            else:
                return FileOperationResult(source_path=path, destination_path=str(destination), file_size=size)

    def _download_once(self, path: str, destination: Path, call_began_s: float) -> int:
        """Copy a file whole or not at all. Returns its size in bytes."""
        aside = destination.parent / f".{destination.name}.{secrets.token_hex(6)}.part"
        began_s = clock.now_s()
        response = self._send(
            "GET", "/api/file/download", params={"path": path}, is_streamed=True, call_began_s=call_began_s
        )
        size = 0
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for piece in self._guarded(response.iter_raw(_COPY_BYTES), began_s):
                    file.write(piece)
                    size += len(piece)
                os.fchmod(file.fileno(), int(response.headers.get("X-File-Mode", "0644"), 8) & 0o777)
            aside.replace(destination)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        finally:
            response.close()
        return size

    def read(self, source: str) -> bytes:
        """The content of a file of the workspace."""
        return self._send("GET", "/api/file/download", params={"path": self._absolute(source)}).content

    def git_changes(self, path: str) -> list[GitChange]:
        """The changed files of the repository at `path`; empty where there is none."""
        answer = self._any("GET", "/api/git/changes", params={"path": self._absolute(path)})
        return [GitChange.model_validate(item) for item in answer]

    def git_diff(self, path: str) -> GitDiff:
        """The file at `path` before and after."""
        return GitDiff.model_validate(self._json("GET", "/api/git/diff", params={"path": self._absolute(path)}))

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"{self._working_dir.rstrip('/')}/{path}"

    def _command_body(
        self, command: str, cwd: str | None, timeout_s: float | None, env: dict[str, str] | None
    ) -> dict[str, Any]:
        where = self._absolute(cwd) if cwd else self._working_dir
        if self._is_bundled:
            return {"id": str(uuid.uuid4()), "command": command, "cwd": where, "timeout": timeout_s, "env": env or {}}
        # OpenHands' server runs /bin/sh, takes whole seconds (0 means none at all), and gives its own stdin.
        # The remark makes the text one of its kind: it is all that a command can be found by if its connection breaks.
        line = f"{wrap_command(command, where, env or {})} # {uuid.uuid4()}"
        return {"command": line, "timeout": max(1, math.ceil(timeout_s or 1))}

    def _as_result(self, command: str, answer: dict[str, Any], timeout_s: float, took_s: float) -> CommandResult:
        code = answer.get("exit_code")
        if not isinstance(code, int):
            raise ServerResponseError("The agent server gave no exit code.", evidence=str(answer)[:500])
        timed_out = bool(answer.get("timeout_occurred"))
        if not self._is_bundled and code == -1:
            # Its -1 is a time-out, or a spawn that failed; only the clock tells them apart.
            timed_out = took_s >= math.floor(timeout_s)
            if not timed_out:
                raise CommandError(
                    "The agent server could not start a command.", command=command, evidence=str(answer.get("stderr"))
                )
        return CommandResult(
            command=command,
            exit_code=code,
            stdout=_text(answer, "stdout"),
            stderr=_text(answer, "stderr"),
            timeout_occurred=timed_out,
            truncated=bool(answer.get("stdout_truncated") or answer.get("stderr_truncated")),
        )

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self._any(method, path, **options)
        if not isinstance(answer, dict):
            raise ServerResponseError(f"{method} {path}: the answer is not an object.", evidence=repr(answer)[:500])
        return answer

    def _any(self, method: str, path: str, *, timeout_s: float | None = None, **options: Any) -> Any:
        if timeout_s is not None:
            options["timeout"] = httpx.Timeout(_ANSWER_TIMEOUT_S, read=timeout_s)
        return _parse_json(self._send(method, path, **options).content)

    def _send(
        self,
        method: str,
        path: str,
        *,
        is_streamed: bool = False,
        is_repeatable: bool = True,
        content_of: Callable[[], dict[str, Any]] = dict,
        call_began_s: float | None = None,
        **options: Any,
    ) -> httpx.Response:
        """The answer to a request, if it is a good one.

        Args:
            is_streamed: its body is read by the caller, who closes it.
            is_repeatable: it may be sent again when the connection broke after a part of it was sent.
            content_of: makes the request's body, once for each time that it is sent.
            call_began_s: when the call began that this is a part of; None: now.
            options: as `httpx.Client.build_request` takes them.

        Raises:
            ServerNotReadyError, ServerUnavailableError, ServerResponseError, TunnelError
        """
        patience = _Patience()
        call_began_s = clock.now_s() if call_began_s is None else call_began_s
        while True:
            began_s = clock.now_s()
            request = self.http.build_request(method, path, **options, **content_of())
            self._call.began_s = call_began_s
            try:
                return self._send_once(request, began_s, is_streamed=is_streamed)
            except _NotSentError as error:
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
        except (httpcore.TimeoutException, httpx.TimeoutException) as error:
            raise ServerNotReadyError(
                f"{what}: the agent server did not answer in time.", evidence=str(error)
            ) from error
        except (httpcore.RemoteProtocolError, httpx.RemoteProtocolError) as error:
            hung_up = TunnelLostError(f"{what}: the connection ended before the answer.", evidence=str(error))
            raise self._explain(hung_up, began_s) from error
        except (httpcore.NetworkError, httpx.TransportError) as error:
            broke = TunnelLostError(f"{what}: the connection broke.", evidence=str(error))
            raise self._explain(broke, began_s) from error
        except _NotSentError as error:
            found = self._explain(error.reason, began_s)
            if not isinstance(found, TunnelError):
                raise found from error.reason
            raise _NotSentError(found) from error
        except (TunnelError, ServerUnavailableError) as error:  # of a stream's first bytes
            raise self._explain(error, began_s) from error.__cause__
        if response.is_success:
            return response
        try:
            detail = b"".join(self._guarded(response.iter_bytes(), began_s))[:2000].decode("utf-8", "replace")
        finally:
            response.close()
        refused = _response_error(what, response.status_code, detail)
        raise self._explain(refused, began_s) if response.status_code == _UNAVAILABLE else refused

    def _guarded(self, pieces: Iterator[bytes], began_s: float) -> Iterator[bytes]:
        """`pieces`, with what can break while a body is read as one of our errors.

        Args:
            began_s: when the call began.
        """
        try:
            yield from pieces
        except (httpcore.TimeoutException, httpx.TimeoutException) as error:
            raise ServerNotReadyError(
                "The agent server stopped in the middle of an answer.", evidence=str(error)
            ) from error
        except (httpcore.NetworkError, httpcore.RemoteProtocolError, httpx.TransportError) as error:
            broke = TunnelLostError("The connection broke in the middle of an answer.", evidence=str(error))
            raise self._explain(broke, began_s) from error
        except (TunnelError, ServerUnavailableError) as error:  # of our own streams
            raise self._explain(error, began_s) from error.__cause__


def wrap_command(command: str, cwd: str, env: dict[str, str]) -> str:
    """`command` for a server that runs /bin/sh: in `cwd`, with `env` and an empty stdin, in bash where there is one."""
    settings = "".join(f"export {name}={shlex.quote(value)}; " for name, value in env.items())
    line = shlex.quote(command)
    return (
        f"cd -- {shlex.quote(cwd)} || exit 1; {settings}"
        f"if command -v bash >/dev/null 2>&1; then exec bash -c {line} </dev/null; "
        f"else exec sh -c {line} </dev/null; fi"
    )


@contextlib.contextmanager
def _command_errors(command: str) -> Iterator[None]:
    """A server's "this can't be done" (422) to a command, as the error that says so."""
    try:
        yield
    except ServerResponseError as error:
        if error.status != _UNPROCESSABLE:
            raise
        raise CommandError("The command could not be started.", command=command, evidence=error.evidence) from error


def _text(answer: dict[str, Any], name: str) -> str:
    encoded = answer.get(f"{name}_b64")
    if encoded:
        return base64.b64decode(encoded).decode("utf-8", "surrogateescape")
    return str(answer.get(name) or "")


def _chunks(file: Any) -> Iterator[bytes]:
    while data := file.read(_COPY_BYTES):
        yield data


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line for line in whole if line)
    if rest:
        yield rest


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ServerResponseError("The agent server's answer is not JSON.", evidence=repr(data[:200])) from error


def _response_error(what: str, status: int, detail: str) -> ServerResponseError:
    remedy = "Its key has changed: attach to the workspace anew." if status in (401, 403) else ""
    return ServerResponseError(
        f"{what}: the agent server answered {status}.", status=status, evidence=detail, remedy=remedy
    )
