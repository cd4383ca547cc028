"""Claims about commands that were started, and what is told of them later."""

from __future__ import annotations

import base64
import time
import uuid

import pytest

from tests.unit.server.running import RunningServer, eventually, is_alive


def _output(server: RunningServer, command_id: str, **query: object) -> dict[str, object]:
    answer = server.http.get(f"/api/bash/bash_commands/{command_id}/output", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_was_written_since_a_place_is_told(server: RunningServer) -> None:
    started = server.start("printf abc; printf de >&2; exit 7")
    answer = _output(server, started["id"], wait_s=10, stdout_from=1, stderr_from=2)
    assert (answer["stdout"], answer["stdout_from"], answer["stdout_bytes"]) == ("bc", 1, 3)
    assert (answer["stderr"], answer["stderr_from"], answer["exit_code"]) == (None, 2, 7)
    assert answer["running"] is False


def test_a_wait_is_no_longer_than_asked_and_tells_nothing_that_is_not_wanted(server: RunningServer) -> None:
    started = server.start("echo on; sleep 70")
    begun = time.monotonic()
    answer = _output(server, started["id"], wait_s=0.3, limit_bytes=0)
    assert 0.3 <= time.monotonic() - begun < 5
    assert (answer["running"], answer["exit_code"], answer["stdout"], answer["stdout_more"]) == (True, None, None, True)
    server.http.post(f"/api/bash/bash_commands/{started['id']}/stop")


def test_what_is_past_memory_is_read_from_the_file(server: RunningServer) -> None:
    started = server.start("head -c 9000000 /dev/zero | tr '\\0' x; printf end")
    answer = _output(server, started["id"], wait_s=20, stdout_from=8_999_990)
    assert (answer["stdout"], answer["stdout_more"]) == ("x" * 10 + "end", False)
    first = _output(server, started["id"])
    assert (len(str(first["stdout"])), first["stdout_more"]) == (8 * 1024 * 1024, True)


def test_a_character_is_told_whole_and_bytes_at_the_end_as_they_are(server: RunningServer) -> None:
    server.run("rm -f gate; mkfifo gate")
    started = server.start(r"printf 'x\303'; read -r line <gate; printf '\274\377'")
    eventually(lambda: _output(server, started["id"])["stdout_bytes"] == 2)
    assert _output(server, started["id"])["stdout"] == "x"
    server.run("echo >gate")
    ended = _output(server, started["id"], wait_s=10, stdout_from=1)
    assert base64.b64decode(str(ended["stdout_b64"])) == b"\xc3\xbc\xff"


@pytest.mark.parametrize(
    "query", [{"wait_s": "x"}, {"wait_s": -1}, {"wait_s": 31}, {"stdout_from": -1}, {"limit_bytes": "a"}]
)
def test_places_waits_and_limits_are_numbers(server: RunningServer, query: dict[str, object]) -> None:
    started = server.start("true")
    assert server.http.get(f"/api/bash/bash_commands/{started['id']}/output", params=query).status_code == 422


def test_an_unknown_id_is_404_and_a_forgotten_one_410(server: RunningServer) -> None:
    assert server.http.get(f"/api/bash/bash_commands/{uuid.uuid4()}/output").status_code == 404
    command_id = uuid.uuid4().hex
    server.run("true", id=command_id)
    server.http.delete("/api/bash/bash_events")
    assert server.http.get(f"/api/bash/bash_commands/{command_id}/output").status_code == 410


@pytest.mark.parametrize(
    "escape",
    [
        "setsid sleep 71 & echo $!",
        "(setsid sh -c 'sleep 71 & echo $!; wait' &); sleep 0.2",
        "env -i setsid sleep 71 & echo $!",
        "env -i setsid sh -c 'trap \"\" TERM; echo $$; sleep 71; sleep 71' & true",
    ],
)
def test_a_timeout_ends_what_took_a_session_of_its_own(server: RunningServer, escape: str) -> None:
    result = server.run(f"{escape}; sleep 71", timeout=1)
    assert result["timeout_occurred"]
    pids = [int(pid) for pid in result["stdout"].split()]
    assert pids
    assert not any(is_alive(pid) for pid in pids)


def test_a_command_has_a_mark_and_its_neighbour_another(server: RunningServer) -> None:
    marks = {server.run('echo "$HPC_WORKSPACE_COMMAND"', id=str(uuid.uuid4()))["stdout"] for _ in range(2)}
    assert len(marks) == 2
