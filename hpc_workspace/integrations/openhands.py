"""A workspace as OpenHands' conversations want one: `Conversation(agent=…, workspace=HpcWorkspace(…))`.

Needs the extra `openhands` (Python >= 3.12). Importing this module imports OpenHands' SDK, which takes seconds. There
is nothing here about containers, jobs or tunnels: an `ApptainerWorkspace` does all of it, and this wraps one.

Source: openhands-sdk 1.57.0 to 1.58.2: RemoteWorkspace, RemoteConversation and WebSocketCallbackClient.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
from pydantic import Field, PrivateAttr

from hpc_workspace import clock
from hpc_workspace.client.transport import NotSentError
from hpc_workspace.connect.listener import Listener
from hpc_workspace.connect.streams import RefusedError, SocketStream
from hpc_workspace.errors import (
    AuthError,
    HostKeyError,
    ServerResponseError,
    ServerUnavailableError,
    TunnelError,
    TunnelLostError,
    WorkspaceError,
)
from hpc_workspace.options import Connect, PullPolicy, SlurmOptions, WorkspaceOptions, this_platform
from hpc_workspace.workspace import ApptainerWorkspace, Workspace

if TYPE_CHECKING:
    from hpc_workspace.connect.reverse import Reverse

try:
    from openhands.sdk.conversation.impl.remote_conversation import RemoteConversation
    from openhands.sdk.git.models import GitChange, GitDiff
    from openhands.sdk.secret import LookupSecret
    from openhands.sdk.workspace import RemoteWorkspace
    from openhands.sdk.workspace.models import CommandResult, FileOperationResult
except ImportError as error:
    raise ImportError(
        "OpenHands' SDK can't be imported. Install it in Python >= 3.12: pip install 'hpc-workspace[openhands]'"
    ) from error

log = logging.getLogger(__name__)

# As the library's own calls: an sshd restarts in seconds, a switch in a minute.
_HEAL_S = 90.0
_TRIES_S = (0.05, 2.0)
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_OWN_FIELDS = ("read_timeout", "max_connections")
_EVENTS_SOCKET = b"GET /sockets/events/"


class HpcWorkspace(RemoteWorkspace):  # type: ignore[misc]  # OpenHands' SDK is not there for mypy
    """OpenHands' workspace in an Apptainer container, on this machine or, with `slurm=`, on a compute node.

    The options are those of `ApptainerWorkspace`; `read_timeout` and `max_connections` are OpenHands' own. It starts on
    construction. It is a context manager: leaving the block closes it, and so does the end of the interpreter.

    Raises: as `ApptainerWorkspace` and its `start`.
    """

    # The name of this class must be unique among all subclasses of RemoteWorkspace in a process: OpenHands tells them
    # by it, and two of one name break every validation. So it is not ApptainerWorkspace.

    host: str = ""
    api_key: str | None = Field(default=None, repr=False, exclude=True)
    working_dir: str = "/workspace"
    server_image: str | None = None
    sif_file: str | None = None
    image: str | None = None
    host_port: int | None = None
    mount_dir: str | None = None
    cache_dir: str | None = None
    forward_env: list[str] = Field(default_factory=lambda: ["DEBUG"])
    detach_logs: bool = True
    extra_ports: bool = False
    platform: str = Field(default_factory=this_platform)
    use_fakeroot: bool = True
    extra_bind_mounts: list[str] = Field(default_factory=list)
    enable_gpu: bool = False
    enable_docker_compat: bool = True
    disable_mount_locations: list[str] = Field(default_factory=lambda: ["hostfs", "bind-paths"])
    health_check_timeout: float = 120.0
    pull_policy: PullPolicy = "missing"
    runtime: str = "auto"
    writable: str = "overlay"
    max_processes: int | None = None
    verify: bool | str = False
    encryption_pem: str | None = None
    slurm: SlurmOptions | str | None = None
    connect: Connect = "auto"
    queue_timeout: float | None = None
    idle_timeout: float | None = 900.0

    _client: httpx.Client | None = PrivateAttr(default=None)
    _workspace: Workspace = PrivateAttr()
    _front: _Front = PrivateAttr()
    _extra_fronts: dict[str, Listener] = PrivateAttr(default_factory=dict)

    def __init__(self, **options: Any) -> None:
        own = {name: options.pop(name) for name in _OWN_FIELDS if name in options}
        given = {name: str(value) if isinstance(value, PurePath) else value for name, value in options.items()}
        workspace = ApptainerWorkspace(**given)
        port = workspace.options.host_port
        chosen = {name: getattr(workspace.options, name) for name in WorkspaceOptions.model_fields}
        if port is not None:
            # The port is this class's; the workspace below may listen where it likes.
            workspace = ApptainerWorkspace(**given | {"host_port": None})
        front = _Front(workspace, port)
        try:
            workspace.start()
            self._wrap(workspace, front, **own, **chosen)
            if port is not None:
                for step, (name, listener) in enumerate(workspace.extra_ports.items(), 1):
                    self._extra_fronts[name] = Listener(_dial_to(listener.port), port + step)
        except BaseException:
            front.close()
            workspace.close()
            raise

    def _wrap(self, workspace: Workspace, front: _Front, **fields: Any) -> None:
        fields |= {"host": front.url, "api_key": workspace.api_key, "working_dir": workspace.working_dir}
        super().__init__(**fields)
        self._workspace, self._front = workspace, front
        _go_round_proxies()

    @classmethod
    def attach(cls, workspace_id: str, *, connect: Connect = "auto") -> HpcWorkspace:
        """The running workspace with this id, in any process. Its conversations are there:
        `Conversation(agent=…, workspace=…, conversation_id=…)`.

        Raises: as `Workspace.attach`.
        """
        workspace = Workspace.attach(workspace_id, connect=connect)
        attached = cls.__new__(cls)
        attached._wrap(workspace, _Front(workspace, None), connect=connect)
        return attached

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._workspace!r}>"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels as its id: the other process attaches to it."""
        return type(self).attach, (self.id,)

    @property
    def workspace(self) -> Workspace:
        """The workspace itself, for what OpenHands has no name for: `stream_command`, `logs`, `notices` and more."""
        return self._workspace

    @property
    def id(self) -> str:
        """For `attach`."""
        return self._workspace.id

    @property
    def node(self) -> str:
        """The short name of the node that it runs on."""
        return self._workspace.node

    @property
    def job(self) -> str | None:
        """Slurm's job id; None on this machine."""
        return self._workspace.job

    @property
    def client(self) -> httpx.Client:
        """OpenHands' HTTP client of the agent server: no proxy of the environment ever gets the key."""
        client = self._client
        if client is None:
            client = self._client = httpx.Client(
                base_url=self.host,
                timeout=httpx.Timeout(connect=10.0, read=self.read_timeout, write=10.0, pool=10.0),
                headers=self._headers,
                transport=_HealingTransport(lambda: self._workspace.client, self._explain),
                trust_env=False,
            )
        return client

    def _explain(self, error: WorkspaceError, since_s: float) -> WorkspaceError:
        return self._workspace._require_link().explain(error, since_s)

    @property
    def alive(self) -> bool:
        """Whether the agent server answers now."""
        return self._workspace.alive

    def execute_command(self, command: str, cwd: str | Path | None = None, timeout: float = 30.0) -> CommandResult:
        """Run a shell command to its end.

        Raises: as `Workspace.execute_command`; a broken connection is never an exit code.
        """
        result = self._workspace.execute_command(command, None if cwd is None else str(cwd), timeout)
        return CommandResult(**result.model_dump(exclude={"truncated"}))

    def file_upload(self, source_path: str | Path | bytes, destination_path: str | Path) -> FileOperationResult:
        """Copy a file of ours, or bytes, into the workspace. A file that can't be read or written is `success=False`.

        Raises:
            ServerError, TunnelError: the server or the way to it is gone.
        """
        with _refusal_of("upload" if isinstance(source_path, bytes) else source_path, destination_path) as refusal:
            if isinstance(source_path, bytes):
                result = self._workspace.write_file(str(destination_path), source_path)
            else:
                result = self._workspace.file_upload(source_path, str(destination_path))
            return FileOperationResult(**result.model_dump())
        return refusal.result

    def file_download(self, source_path: str | Path, destination_path: str | Path) -> FileOperationResult:
        """Copy a file of the workspace to ours. A file that is not there, or can't be written, is `success=False`.

        Raises:
            ServerError, TunnelError: the server or the way to it is gone.
        """
        with _refusal_of(source_path, destination_path) as refusal:
            return FileOperationResult(**self._workspace.file_download(source_path, destination_path).model_dump())
        return refusal.result

    def git_changes(self, path: str | Path) -> list[GitChange]:
        """The changed files of the repository at `path`."""
        changes: Any = self._workspace.git_changes(str(path))
        return [GitChange(**change.model_dump()) for change in changes]

    def git_diff(self, path: str | Path) -> GitDiff:
        """The file at `path` before and after its changes."""
        return GitDiff(**self._workspace.git_diff(str(path)).model_dump())

    def get_secrets(self, *arguments: Any, **named: Any) -> dict[str, LookupSecret]:
        """The secrets that the agent server keeps, as references for `conversation.update_secrets`: arguments as there.

        They name no host, and the agent server takes that for itself. OpenHands' own name the port that its client
        uses; in there, that port and the key that is sent with the reference may be a stranger's.
        """
        secrets: dict[str, LookupSecret] = super().get_secrets(*arguments, **named)
        for secret in secrets.values():
            secret.url = urlsplit(secret.url).path
        return secrets

    def forward(self, port: int) -> Listener:
        """A port of 127.0.0.1 here for `port` of the workspace; see `Workspace.forward`."""
        return self._workspace.forward(port)

    def reverse(self, port: int) -> Reverse:
        """A port inside the workspace for `port` of 127.0.0.1 here, such as a model's; see `Workspace.reverse`."""
        return self._workspace.reverse(port)

    def register_cost(self, cost: float) -> None:
        """OpenHands' own bookkeeping, and an end for the WebSocket of the conversation that closes.

        `RemoteConversation.close` calls this, and next waits for its WebSocket's thread, which looks up at the next
        message or when its connection ends; no message comes any more, and after 5 s it gives up.
        """
        super().register_cost(cost)
        conversation = sys._getframe(1).f_locals.get("self")
        if isinstance(conversation, RemoteConversation):
            self._front.hang_up(conversation.id)

    def detach(self) -> str:
        """Leave the workspace running, until it is idle for too long. Returns its id, for `attach`."""
        workspace_id = self._workspace.detach()
        self._let_go()
        return workspace_id

    def close(self) -> None:
        """End the workspace and wait until nothing of it is left. A second call does nothing."""
        self._let_go()
        self._workspace.close()

    cleanup = close

    def _let_go(self) -> None:
        for listener in (self._front, *self._extra_fronts.values()):
            listener.close()
        self.reset_client()

    def __enter__(self) -> HpcWorkspace:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            super().__exit__(kind, error, trace)  # tells an automation service, if there is one
        finally:
            self.close()


class _Refusal:
    """The result of a transfer that the file systems on either side refused."""

    result: FileOperationResult


@contextlib.contextmanager
def _refusal_of(source: str | Path, destination: str | Path) -> Iterator[_Refusal]:
    refusal = _Refusal()
    try:
        yield refusal
    except (ServerResponseError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        refusal.result = FileOperationResult(
            success=False, source_path=str(source), destination_path=str(destination), error=str(error)
        )


def _dial_to(port: int) -> Callable[[], SocketStream]:
    return lambda: SocketStream(socket.create_connection(("127.0.0.1", port)))


class _Front(Listener):
    """The port that OpenHands' clients talk to, which can hang up on one conversation's WebSocket."""

    def __init__(self, workspace: Workspace, port: int | None) -> None:
        self._workspace = workspace
        self._sockets: set[_Connection] = set()
        self._sockets_lock = threading.Lock()
        super().__init__(self._connect, port)

    def _connect(self) -> _Connection:
        port = int(self._workspace.host.rpartition(":")[2])
        return _Connection(socket.create_connection(("127.0.0.1", port)), self)

    def note(self, connection: _Connection, *, is_open: bool) -> None:
        with self._sockets_lock:
            (self._sockets.add if is_open else self._sockets.discard)(connection)

    def hang_up(self, conversation_id: uuid.UUID) -> None:
        """End the open WebSockets of a conversation."""
        with self._sockets_lock:
            found = [connection for connection in self._sockets if connection.is_of(conversation_id)]
        for connection in found:
            connection.close()


class _Connection(SocketStream):
    """One connection through a `_Front`; remembers what it was asked for."""

    def __init__(self, connection: socket.socket, front: _Front) -> None:
        super().__init__(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._front = front
        self._request = b""

    def sendall(self, data: bytes) -> None:
        if not self._request:
            self._request = data[:200]
            if self._request.startswith(_EVENTS_SOCKET):
                self._front.note(self, is_open=True)
        super().sendall(data)

    def is_of(self, conversation_id: uuid.UUID) -> bool:
        return self._request.startswith(_EVENTS_SOCKET + str(conversation_id).encode())

    def close(self) -> None:
        self._front.note(self, is_open=False)
        super().close()


class _HealingTransport(httpx.BaseTransport):
    """Requests through the door, tried again for 90 s where that can't do a thing twice.

    OpenHands' conversations poll on after an `httpx.RequestError`. Any other error ends their run: those of a workspace
    that is over, or runs anew.
    """

    def __init__(
        self, client: Callable[[], httpx.Client], explain: Callable[[WorkspaceError, float], WorkspaceError]
    ) -> None:
        self._client = client
        self._explain = explain

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer.

        Raises:
            TunnelLostError: it broke under a request that can't be repeated, and that may have arrived.
            httpx.TransportError: there is no way, or no answer.
            WorkspaceError: there will be none.
        """
        deadline, pauses_s = clock.Deadline(_HEAL_S), clock.pauses_s(*_TRIES_S)
        while True:
            began_s = clock.now_s()
            try:
                return self._send(request)
            except httpx.ConnectError as error:
                broke: httpx.TransportError = error
            except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                if not _may_repeat(request):
                    raise self._explain(_may_have_arrived(request, error), began_s) from error
                broke = error
            if deadline.is_over:
                raise broke
            log.info("trying again: %s", broke)
            clock.sleep(next(pauses_s))

    def _send(self, request: httpx.Request) -> httpx.Response:
        """The answer, as it came.

        Raises:
            httpx.ConnectError: there is no way at present; nothing was sent.
            httpx.TransportError: it broke; a part was sent.
            WorkspaceError: there will be no way.
        """
        with _httpx_errors(request):
            answer = self._client().send(request, stream=True)
            stream: httpx.SyncByteStream = _Body(answer, request)
            if answer.headers.get("content-type", "").startswith("application/json"):
                stream = httpx.ByteStream(b"".join(stream))  # here it can be asked for again
                answer.close()
        return httpx.Response(answer.status_code, headers=answer.headers, stream=stream)


def _may_repeat(request: httpx.Request) -> bool:
    """Whether a request that may have arrived can be sent again.

    `run` of a conversation that runs is refused (409), which its caller takes for a yes, and that of one that has
    finished does nothing.
    """
    return request.method in _SAFE or (request.method == "POST" and request.url.path.endswith("/run"))


def _may_have_arrived(request: httpx.Request, broke: httpx.TransportError) -> TunnelLostError:
    """What to say of a request that broke, and that the server can't tell from a second one of its kind."""
    remedy = "Look whether it did before you do it again; the workspace itself goes on."
    if request.url.path.endswith("/events"):
        remedy = (
            "Call conversation.state.events.reconcile(), and send the message again if it is not among"
            " conversation.state.events."
        )
    return TunnelLostError(
        f"The connection broke under {request.method} {request.url.path}: it may have arrived, or not.",
        evidence=str(broke),
        remedy=remedy,
    )


@contextlib.contextmanager
def _httpx_errors(request: httpx.Request) -> Iterator[None]:
    """Our errors that may pass as httpx's own; those that can't stay as they are."""
    try:
        yield
    except NotSentError as error:
        if isinstance(error.reason, (AuthError, HostKeyError)):
            raise error.reason from error
        raise
    except (AuthError, HostKeyError, RefusedError):
        raise
    except TunnelLostError as error:
        raise httpx.ReadError(str(error), request=request) from error
    except (TunnelError, ServerUnavailableError) as error:
        raise httpx.ConnectError(str(error), request=request) from error


class _Body(httpx.SyncByteStream):
    def __init__(self, answer: httpx.Response, request: httpx.Request) -> None:
        self._answer = answer
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        with _httpx_errors(self._request):
            yield from self._answer.iter_raw()

    def close(self) -> None:
        self._answer.close()


def _go_round_proxies() -> None:
    """Have this process talk to 127.0.0.1 itself, where its environment names a proxy.

    OpenHands' WebSocket goes by the proxy for all that `no_proxy` does not name, and would hand it the key.
    """
    named = urllib.request.getproxies()
    if not named.keys() - {"no"} or urllib.request.proxy_bypass("127.0.0.1"):
        return
    bypassed = ",".join(filter(None, (named.get("no"), "127.0.0.1")))
    log.info("no_proxy is now %s: what is sent to the workspace must not go to a proxy", bypassed)
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = bypassed


__all__ = ["HpcWorkspace"]
