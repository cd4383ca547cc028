"""Claims about /api/bash/stream."""

from __future__ import annotations

import base64
import json
import time
import uuid
from pathlib import Path

import pytest

from tests.unit.server.running import RunningServer, eventually, joined


def test_first_comes_the_id_last_the_result(server: RunningServer) -> None:
    lines = server.stream(r"printf 'a\377'; echo e >&2; exit 5")
    assert uuid.UUID(lines[0]["id"])
    assert (joined(lines, "stdout"), joined(lines, "stderr")) == (b"a\xff", b"e\n")
    assert (lines[-1]["exit_code"], lines[-1]["timeout_occurred"]) == (5, False)


def test_output_is_on_its_way_while_the_command_runs(server: RunningServer) -> None:
    body = {"command": "echo first; read line < gate; echo $line"}
    server.run("rm -f gate; mkfifo gate")
    with server.http.stream("POST", "/api/bash/stream", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert base64.b64decode(json.loads(next(lines))["data_b64"]) == b"first\n"
        with server.client() as other:  # only now may it go on
            other.post("/api/bash/execute_bash_command", json={"command": "echo opened > gate"})
        assert base64.b64decode(json.loads(next(lines))["data_b64"]) == b"opened\n"


def test_a_large_stream_is_whole(server: RunningServer) -> None:
    lines = server.stream("seq 3000000")
    assert joined(lines, "stdout") == "".join(f"{n}\n" for n in range(1, 3_000_001)).encode()


def test_a_reader_who_stops_stops_the_command_s_pipe_and_not_the_server(tmp_path: Path) -> None:
    running = RunningServer(tmp_path)
    try:
        body = {"command": "yes | head -c 100000000; touch written", "linger_s": 0}
        with running.client() as slow, slow.stream("POST", "/api/bash/stream", json=body) as answer:
            pieces = answer.iter_raw()  # kept: httpx closes the connection with its iterator
            next(pieces)
            started = running.events(kind__eq="BashCommand")[0]
            assert running.run("sleep 0.3; test -e written")["exit_code"] == 1
            assert running.start(body["command"], id=started["id"])["running"]
            assert running.memory_bytes() < 120 * 1024 * 1024
        eventually(lambda: running.info()["running_commands"] == 0)
    finally:
        running.stop()


def test_going_away_leaves_the_command_running(server: RunningServer) -> None:
    command = "echo on; sleep 0.5; echo still here"
    with server.client() as other, other.stream("POST", "/api/bash/stream", json={"command": command}) as answer:
        command_id = json.loads(next(answer.iter_lines()))["id"]
    assert server.run(command, id=command_id)["stdout"] == "on\nstill here\n"


def test_going_away_ends_the_command_on_request(server: RunningServer) -> None:
    body = {"command": "echo on; sleep 67", "linger_s": 0}
    begun = time.monotonic()
    with server.client() as other, other.stream("POST", "/api/bash/stream", json=body) as answer:
        command_id = json.loads(next(answer.iter_lines()))["id"]
    assert server.run(body["command"], id=command_id)["exit_code"] == -15
    assert time.monotonic() - begun < 5


def test_a_reader_who_comes_back_in_time_finds_the_command_and_only_what_he_has_not_yet(server: RunningServer) -> None:
    body = {"id": uuid.uuid4().hex, "command": "echo one; cat /dev/null; sleep 0.3; echo two", "linger_s": 30}
    with server.client() as other, other.stream("POST", "/api/bash/stream", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert base64.b64decode(json.loads(next(lines))["data_b64"]) == b"one\n"
    again = server.stream(body["command"], id=body["id"], stdout_from=4, linger_s=30)
    assert joined(again, "stdout") == b"two\n"
    assert again[-1]["exit_code"] == 0


@pytest.mark.parametrize("fields", [{"stdout_from": -1}, {"stderr_from": 1.5}, {"stdout_from": True}, {"linger_s": -1}])
def test_places_and_patience_are_numbers(server: RunningServer, fields: dict[str, object]) -> None:
    with server.client() as client:
        assert client.post("/api/bash/stream", json={"command": "true"} | fields).status_code == 422


def test_a_second_stream_of_an_id_begins_at_the_beginning(server: RunningServer) -> None:
    command_id = uuid.uuid4().hex
    server.run("seq 2000000", id=command_id)
    lines = server.stream("seq 2000000", id=command_id)
    assert len(joined(lines, "stdout")) == lines[-1]["stdout_bytes"] > 8 * 1024 * 1024


def test_a_timeout_ends_the_stream(server: RunningServer) -> None:
    lines = server.stream("echo x; sleep 68", timeout=0.2)
    assert (lines[-1]["exit_code"], lines[-1]["timeout_occurred"]) == (-1, True)
