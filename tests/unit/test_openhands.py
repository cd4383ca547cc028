"""OpenHands' workspace, without a container: what it is, what it takes, what it says. Needs the extra `openhands`.

Skipped where the SDK is not installed (it needs Python >= 3.12): `pip install -e '.[openhands]'`.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest

pytest.importorskip("openhands.sdk", reason="needs the extra openhands, in Python >= 3.12")

import httpcore
import httpx
from openhands.sdk.workspace import RemoteWorkspace

from hpc_workspace import errors
from hpc_workspace.integrations import openhands
from hpc_workspace.integrations.openhands import HpcWorkspace
from hpc_workspace.options import WorkspaceOptions


def test_it_is_openhands_workspace_by_a_name_of_its_own() -> None:
    assert issubclass(HpcWorkspace, RemoteWorkspace)
    assert HpcWorkspace.__name__ == "HpcWorkspace"
    assert "<locals>" not in HpcWorkspace.__qualname__


def test_every_option_is_a_field() -> None:
    assert set(WorkspaceOptions.model_fields) <= set(HpcWorkspace.model_fields)
    for name, field in WorkspaceOptions.model_fields.items():
        assert HpcWorkspace.model_fields[name].get_default(call_default_factory=True) == field.get_default(
            call_default_factory=True
        ), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give exactly one of server_image, sif_file and image"),
        ({"sif_file": "a.sif", "server_image": "x"}, "give exactly one of"),
        ({"sif_file": "a.sif", "base_image": "x"}, "has no option 'base_image'"),
        ({"sif_file": "a.sif", "host_port": 0}, "host_port"),
        ({"sif_file": "a.sif", "api_key": "chosen"}, "has no option 'api_key'"),
    ],
)
def test_a_wrong_option_is_named_before_anything_starts(options: dict[str, object], said: str) -> None:
    with pytest.raises(errors.ConfigError, match=said):
        HpcWorkspace(**options)


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"Port {port} is not available"):
            HpcWorkspace(sif_file="/nowhere.sif", host_port=port)


def test_a_start_that_fails_frees_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises((errors.ImageError, errors.PrerequisiteError)):  # or there is no Apptainer here
        HpcWorkspace(sif_file="/nowhere.sif", host_port=port)
    socket.create_server(("127.0.0.1", port)).close()


def test_the_package_does_not_import_openhands() -> None:
    code = "import hpc_workspace, hpc_workspace.workspace, sys; print('openhands' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


class _Server:
    """Answers each request in turn with what it is given: bytes, or nothing at all."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.client = httpx.Client(transport=_Raw(self._socket.getsockname()[1]), base_url="http://workspace")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while self._answers:
                connection, _ = self._socket.accept()
                with connection:
                    self.asked.append(connection.recv(65536).split(b" HTTP")[0])
                    connection.sendall(self._answers.pop(0))

    def close(self) -> None:
        self._socket.close()


class _Raw(httpx.BaseTransport):
    """As a workspace's client: httpcore's errors come through as they are."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pool = httpcore.ConnectionPool(max_keepalive_connections=0)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._pool.request(request.method, f"http://127.0.0.1:{self._port}{request.url.path}")
        return httpx.Response(answer.status, headers=answer.headers, stream=httpx.ByteStream(answer.content))


@pytest.fixture
def servers() -> Iterator[list[_Server]]:
    made: list[_Server] = []
    yield made
    for server in made:
        server.close()


GOOD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def _client(server: _Server) -> httpx.Client:
    return httpx.Client(transport=openhands._HealingTransport(server), base_url="http://127.0.0.1:1")  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/conversations/x"), ("POST", "/api/conversations/x/run")])
def test_what_does_nothing_twice_is_asked_again_after_a_break(servers: list[_Server], method: str, path: str) -> None:
    servers.append(server := _Server(b"", GOOD))
    assert _client(server).request(method, path).json() == {}
    assert server.asked == [f"{method} {path}".encode()] * 2


def test_a_message_that_may_have_arrived_is_not_sent_twice(servers: list[_Server]) -> None:
    servers.append(server := _Server(b"", GOOD))
    with pytest.raises(httpx.RemoteProtocolError):
        _client(server).post("/api/conversations/x/events", json={})
    assert len(server.asked) == 1


def test_the_end_of_the_workspace_is_no_errand_of_the_network() -> None:
    with pytest.raises(errors.ContainerError), openhands._httpx_errors(httpx.Request("GET", "http://x")):
        raise errors.ContainerError("it has ended")


def test_a_websocket_is_told_by_its_conversation() -> None:
    one, other = uuid.uuid4(), uuid.uuid4()
    front = openhands._Front.__new__(openhands._Front)
    front._sockets, front._sockets_lock = set(), threading.Lock()
    ours_tcp, peer = _tcp_pair()
    connection = openhands._Connection(ours_tcp, front)
    connection.sendall(f"GET /sockets/events/{one} HTTP/1.1\r\n".encode())
    front.hang_up(other)
    assert not connection._connection._closed  # type: ignore[attr-defined]
    front.hang_up(one)
    assert peer.recv(100).startswith(b"GET /sockets/events/")
    assert peer.recv(100) == b""
    peer.close()


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]
