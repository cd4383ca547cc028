"""Claims about /sockets/bash-events."""

from __future__ import annotations

import json
import socket as sockets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, unix_connect

from tests.unit.server.running import HEADERS, KEY, RunningServer


@contextmanager
def _connected(server: RunningServer, query: str = "") -> Iterator[ClientConnection]:
    with unix_connect(
        str(server.socket), f"ws://server/sockets/bash-events{query}", additional_headers=HEADERS
    ) as connection:
        yield connection


def _until_end(connection: ClientConnection) -> list[dict[str, Any]]:
    events = []
    while not events or events[-1].get("exit_code") is None or events[-1]["kind"] == "BashCommand":
        events.append(json.loads(connection.recv(timeout=10)))
    return events


def test_a_subscriber_sees_command_and_output(server: RunningServer) -> None:
    with _connected(server) as connection:
        server.run("echo heard")
        events = _until_end(connection)
    assert events[0]["kind"] == "BashCommand"
    assert events[-1]["stdout"] == "heard\n"


def test_the_key_may_come_in_the_query(server: RunningServer) -> None:
    with unix_connect(str(server.socket), f"ws://server/sockets/bash-events?session_api_key={KEY}") as connection:
        connection.send(json.dumps({"command": "echo by message"}))
        assert _until_end(connection)[-1]["stdout"] == "by message\n"


def test_a_bad_message_is_answered_and_the_connection_stays(server: RunningServer) -> None:
    with _connected(server) as connection:
        for message in ("{", json.dumps({"command": 5})):
            connection.send(message)
            assert json.loads(connection.recv(timeout=10))["kind"] == "BashError"
        connection.send(json.dumps({"type": "auth", "session_api_key": KEY}))
        connection.send(json.dumps({"command": "echo fine"}))
        assert _until_end(connection)[-1]["stdout"] == "fine\n"


def test_history_is_sent_on_request(server: RunningServer) -> None:
    server.run("echo long ago")
    with _connected(server, "?resend_mode=all") as connection:
        seen = [json.loads(connection.recv(timeout=10)) for _ in range(len(server.events()))]
    assert any(event.get("stdout") == "long ago\n" for event in seen)


def test_a_subscriber_who_does_not_read_stalls_no_command(tmp_path: Path) -> None:
    running = RunningServer(tmp_path)
    raw = sockets.socket(sockets.AF_UNIX)
    try:
        raw.connect(str(running.socket))
        raw.sendall(
            b"GET /sockets/bash-events HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            + f"X-Session-API-Key: {KEY}\r\n\r\n".encode()
        )
        assert b" 101 " in raw.recv(1000)
        for _ in range(8):
            assert running.run("seq 1000000", timeout=20)["exit_code"] == 0
        raw.settimeout(10)
        last = b""
        while (1013).to_bytes(2, "big") + b"events were not read" not in last:
            last = last[-100:] + raw.recv(1_000_000)
    finally:
        raw.close()
        running.stop()
