"""OpenHands' workspace, without a container: what it is, what it takes, what it says. Needs the extra `openhands`.

`make test-openhands` runs it, in a Python >= 3.12 that has it; where the SDK is not installed it is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest

pytest.importorskip("openhands.sdk", reason="make test-openhands runs it, in Python >= 3.12")

import httpx
import websockets
from openhands.sdk.workspace import RemoteWorkspace

from hpc_workspace import errors
from hpc_workspace.client.transport import DoorTransport
from hpc_workspace.connect.streams import SocketStream
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
    """Answers each request in turn with what it is given: bytes, or nothing at all. Dialled as a workspace's is."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self.asked: list[bytes] = []
        self.refusals: list[errors.WorkspaceError] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._ours = httpx.Client(transport=DoorTransport(self._dial, 0.0), base_url="http://workspace")
        threading.Thread(target=self._serve, daemon=True).start()

    def _dial(self) -> SocketStream:
        if self.refusals:
            raise self.refusals.pop(0)
        return SocketStream(socket.create_connection(self._socket.getsockname()))

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while self._answers:
                connection, _ = self._socket.accept()
                with connection:
                    self.asked.append(connection.recv(65536).split(b" HTTP")[0])
                    connection.sendall(self._answers.pop(0))

    def client(self, why: errors.WorkspaceError | None = None) -> httpx.Client:
        """OpenHands' client of it; whatever breaks was broken by `why`."""
        transport = openhands._HealingTransport(lambda: self._ours, lambda error, since_s: why or error)
        return httpx.Client(transport=transport, base_url="http://127.0.0.1:1")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def servers() -> Iterator[list[_Server]]:
    made: list[_Server] = []
    yield made
    for server in made:
        server.close()


GOOD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


MESSAGE = "/api/conversations/x/events"


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/conversations/x"), ("POST", "/api/conversations/x/run")])
def test_what_does_nothing_twice_is_asked_again_after_a_break(servers: list[_Server], method: str, path: str) -> None:
    servers.append(server := _Server(b"", GOOD))
    assert server.client().request(method, path).json() == {}
    assert server.asked == [f"{method} {path}".encode()] * 2


def test_a_message_that_may_have_arrived_is_not_sent_twice_and_it_is_said_what_to_do(servers: list[_Server]) -> None:
    servers.append(server := _Server(b"", GOOD))
    with pytest.raises(errors.TunnelLostError, match="it may have arrived, or not") as caught:
        server.client().post(MESSAGE, json={})
    assert "conversation.state.events.reconcile()" in str(caught.value)
    assert len(server.asked) == 1


def test_a_message_under_which_the_workspace_ended_says_that(servers: list[_Server]) -> None:
    servers.append(server := _Server(b""))
    with pytest.raises(errors.ContainerError, match="it has ended"):
        server.client(errors.ContainerError("it has ended")).post(MESSAGE, json={})


def test_a_message_that_found_no_way_is_sent_once_there_is_one(servers: list[_Server]) -> None:
    servers.append(server := _Server(GOOD))
    server.refusals += [errors.TunnelError("no way"), errors.TunnelLostError("broken")]
    assert server.client().post(MESSAGE, json={}).json() == {}
    assert server.asked == [f"POST {MESSAGE}".encode()]


@pytest.mark.parametrize("kind", [errors.AuthError, errors.HostKeyError, errors.ContainerError])
def test_a_way_that_there_will_not_be_is_not_waited_for(
    servers: list[_Server], kind: type[errors.WorkspaceError]
) -> None:
    servers.append(server := _Server(GOOD))
    server.refusals.append(kind("never"))
    with pytest.raises(kind, match="never"):
        server.client().get("/api/conversations/x")


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


PROXY = "http://127.0.0.1:9"  # nobody listens there


@pytest.mark.parametrize(
    ("given", "bypassed"),
    [
        ({"HTTPS_PROXY": PROXY}, "127.0.0.1"),
        ({"http_proxy": PROXY, "NO_PROXY": "a.example,b"}, "a.example,b,127.0.0.1"),
        ({"http_proxy": PROXY, "no_proxy": "127.0.0.1"}, "127.0.0.1"),
        ({"http_proxy": PROXY, "no_proxy": "*"}, "*"),
        ({}, None),
    ],
)
def test_the_way_to_the_workspace_goes_round_every_proxy(
    monkeypatch: pytest.MonkeyPatch, servers: list[_Server], given: dict[str, str], bypassed: str | None
) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "")  # so that it is as before afterwards, whatever the code sets
    monkeypatch.setenv("NO_PROXY", "")
    for name in ("no_proxy", "NO_PROXY"):
        os.environ.pop(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    openhands._go_round_proxies()
    assert os.environ.get("no_proxy") == bypassed
    servers.append(workspace := _Server(b""))
    with pytest.raises(websockets.exceptions.InvalidMessage):  # it hangs up
        asyncio.run(_open_websocket(f"ws://127.0.0.1:{workspace.port}/sockets/events/x"))
    assert workspace.asked == [b"GET /sockets/events/x"]


async def _open_websocket(url: str) -> None:
    """As OpenHands' conversations do."""
    async with websockets.connect(url):
        raise AssertionError("it is no server of WebSockets")


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]
