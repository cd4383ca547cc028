"""Claims about commands, asked of a real server."""

from __future__ import annotations

import base64
import threading
import time
import uuid
from pathlib import Path

import pytest

from tests.unit.server.running import KEY, RunningServer, eventually, is_alive


def test_stdout_stderr_and_exit_code_are_kept_apart(server: RunningServer) -> None:
    result = server.run("echo out; echo err >&2; exit 3")
    assert (result["stdout"], result["stderr"], result["exit_code"]) == ("out\n", "err\n", 3)
    assert (result["kind"], result["timeout_occurred"]) == ("BashOutput", False)


def test_silence_is_null(server: RunningServer) -> None:
    result = server.run("true")
    assert (result["stdout"], result["stderr"], result["stdout_b64"]) == (None, None, None)


def test_commands_run_in_bash_and_see_an_empty_stdin(server: RunningServer) -> None:
    assert server.run("[[ -n $BASH_VERSION ]] && cat && echo over")["stdout"] == "over\n"


def test_a_command_starts_in_the_working_dir_which_is_made(server: RunningServer) -> None:
    assert server.run("pwd")["stdout"].strip() == str(server.folder / "ws")


def test_a_relative_cwd_begins_at_the_working_dir(server: RunningServer) -> None:
    server.run("mkdir -p below")
    assert server.run("pwd", cwd="below")["stdout"].strip() == str(server.folder / "ws" / "below")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"command": 1},
        {"command": "a\0b"},
        {"command": "x" * 200_000},
        {"command": "true", "cwd": "/does/not/exist"},
        {"command": "true", "timeout": "5"},
        {"command": "true", "timeout": -1},
        {"command": "true", "env": {"A=B": "c"}},
        {"command": "true", "env": {"A": 1}},
        {"command": "true", "id": "not-a-uuid"},
        [],
    ],
)
def test_what_can_not_run_is_422_with_a_detail(server: RunningServer, body: object) -> None:
    answer = server.http.post("/api/bash/execute_bash_command", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"]


def test_a_bad_cwd_is_named(server: RunningServer) -> None:
    answer = server.http.post("/api/bash/start_bash_command", json={"command": "true", "cwd": "/does/not/exist"})
    assert answer.json()["detail"] == "cwd /does/not/exist is not a directory"


def test_a_command_that_could_not_start_leaves_no_event(server: RunningServer) -> None:
    before = len(server.events(kind__eq="BashCommand"))
    server.http.post("/api/bash/start_bash_command", json={"command": "true", "cwd": "/does/not/exist"})
    assert len(server.events(kind__eq="BashCommand")) == before


def test_a_fraction_of_a_second_is_a_timeout_and_partial_output_is_kept(server: RunningServer) -> None:
    begun = time.monotonic()
    result = server.run("echo before; sleep 60", timeout=0.3)
    assert (result["exit_code"], result["timeout_occurred"], result["stdout"]) == (-1, True, "before\n")
    assert 0.3 <= time.monotonic() - begun < 1.3


def test_a_timeout_ends_what_left_the_process_group_and_what_ignores_term(server: RunningServer) -> None:
    result = server.run("set -m; trap '' TERM; sleep 61 & echo $!; sleep 62 & echo $!; wait; wait", timeout=0.2)
    assert result["timeout_occurred"]
    assert not any(is_alive(int(pid)) for pid in result["stdout"].split())


def test_a_timeout_leaves_time_to_clean_up(server: RunningServer) -> None:
    result = server.run("trap 'echo tidied; exit 0' TERM; sleep 63 & wait", timeout=0.2)
    assert (result["exit_code"], result["stdout"]) == (-1, "tidied\n")


def test_death_by_signal_is_a_negative_exit_code(server: RunningServer) -> None:
    assert server.run("kill -KILL $$")["exit_code"] == -9


def test_a_background_child_that_holds_stdout_neither_delays_the_call_nor_dies(server: RunningServer) -> None:
    begun = time.monotonic()
    result = server.run("(for i in $(seq 600); do echo tick; sleep 0.1; done) & echo $!")
    assert time.monotonic() - begun < 1
    pid = int(result["stdout"].replace("tick\n", ""))
    assert is_alive(pid)
    server.run("sleep 0.5")  # it writes meanwhile: with the pipe closed, SIGPIPE would have ended it
    assert is_alive(pid)
    server.run(f"kill {pid}")


def test_what_comes_just_after_the_shell_s_exit_still_counts(server: RunningServer) -> None:
    assert server.run("echo late > >(sleep 0.01; cat)")["stdout"] == "late\n"


def test_bytes_that_are_no_text_come_exact_in_base64(server: RunningServer) -> None:
    result = server.run(r"printf 'a\0b\377c'; printf 'ok\0' >&2")
    assert base64.b64decode(result["stdout_b64"]) == b"a\0b\xffc"
    assert result["stdout"] == "a\0b\ufffdc"
    assert (result["stderr"], result["stderr_b64"]) == ("ok\0", None)


def test_a_character_written_in_two_pieces_is_one_character_in_the_events(server: RunningServer) -> None:
    started = server.start(r"printf 'x\303'; sleep 0.2; printf '\274y'")
    events = eventually(lambda: [e for e in server.events(command_id__eq=started["id"]) if e["exit_code"] == 0])
    outputs = server.events(command_id__eq=started["id"])
    assert len(outputs) > 1
    assert "".join(event["stdout"] or "" for event in outputs) == "xüy"
    assert all(event["stdout_b64"] is None for event in outputs)
    assert events[0]["order"] == len(outputs) - 1


def test_large_output_is_bounded_in_memory_and_whole_in_a_file(tmp_path: Path) -> None:
    running = RunningServer(tmp_path)
    try:
        result = running.run("head -c 50000000 /dev/zero | tr '\\0' x; echo end")
        assert (len(result["stdout"]), result["stdout_truncated"]) == (8 * 1024 * 1024, True)
        assert result["stdout_bytes"] == 50_000_004
        answer = running.http.get("/api/file/download", params={"path": result["stdout_file"]})
        assert len(answer.content) == 50_000_004
        assert answer.content.endswith(b"xend\n")
        assert running.memory_bytes() < 200 * 1024 * 1024
        running.http.delete("/api/bash/bash_events")
        assert not Path(result["stdout_file"]).exists()
    finally:
        running.stop()


def test_a_small_output_is_in_no_file(server: RunningServer) -> None:
    result = server.run("echo small")
    assert (result["stdout_file"], result["stdout_truncated"], result["stdout_bytes"]) == (None, False, 6)


def test_an_id_runs_once_and_both_callers_get_its_result(server: RunningServer) -> None:
    command_id = str(uuid.uuid4())
    results: list[dict[str, object]] = []
    command = "echo once >> once.txt; sleep 0.2; wc -l < once.txt"
    threads = [threading.Thread(target=lambda: results.append(server.run(command, id=command_id))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result["stdout"] for result in results] == ["1\n"] * 3
    assert server.start(command, id=command_id)["exit_code"] == 0


def test_an_id_with_another_command_is_a_conflict(server: RunningServer) -> None:
    command_id = uuid.uuid4().hex
    server.run("true", id=command_id)
    answer = server.http.post("/api/bash/execute_bash_command", json={"command": "false", "id": command_id})
    assert answer.status_code == 409


def test_a_forgotten_id_does_not_run_again(server: RunningServer) -> None:
    command_id = uuid.uuid4().hex
    server.run("true", id=command_id)
    assert server.http.delete("/api/bash/bash_events").json()["cleared_count"] >= 2
    answer = server.http.post("/api/bash/execute_bash_command", json={"command": "true", "id": command_id})
    assert answer.status_code == 410


def test_stop_ends_one_command_and_not_its_neighbour(server: RunningServer) -> None:
    one, other = server.start("sleep 64"), server.start("sleep 65")
    assert server.http.post(f"/api/bash/bash_commands/{one['id']}/stop").json() == {"success": True}
    assert server.events(command_id__eq=one["id"])[-1]["exit_code"] == -15
    assert server.info()["running_commands"] == 1
    assert server.start("sleep 65", id=other["id"])["running"] is True
    server.http.post(f"/api/bash/bash_commands/{other['id']}/stop")
    assert server.http.post(f"/api/bash/bash_commands/{other['id']}/stop").status_code == 200


def test_stopping_an_unknown_command_is_404(server: RunningServer) -> None:
    assert server.http.post(f"/api/bash/bash_commands/{uuid.uuid4()}/stop").status_code == 404


def test_events_have_orders_from_zero_and_an_exit_code_at_the_end_only(server: RunningServer) -> None:
    started = server.start("echo a; sleep 0.15; echo b; sleep 0.15; echo c >&2")
    eventually(lambda: server.events(command_id__eq=started["id"], order__gt=1))
    eventually(lambda: server.events(command_id__eq=started["id"])[-1]["exit_code"] == 0)
    events = server.events(command_id__eq=started["id"])
    assert [event["order"] for event in events] == list(range(len(events)))
    assert [event["exit_code"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert server.events(command_id__eq=started["id"], order__gt=0) == events[1:]


def test_search_goes_page_by_page_in_both_directions(server: RunningServer) -> None:
    for _ in range(3):
        server.run("echo page")
    for sort_order in ("TIMESTAMP", "TIMESTAMP_DESC"):
        seen: list[str] = []
        query: dict[str, object] = {"limit": 2, "sort_order": sort_order}
        while query.get("page_id", "") is not None:
            page = server.http.get("/api/bash/bash_events/search", params=query).json()
            seen += [item["id"] for item in page["items"]]
            query["page_id"] = page["next_page_id"]
        assert len(seen) == len(set(seen)) >= 6
    assert server.events(sort_order="TIMESTAMP_DESC")[0]["id"] == server.events()[-1]["id"]


def test_an_event_can_be_had_by_its_id(server: RunningServer) -> None:
    started = server.start("true")
    event = server.http.get(f"/api/bash/bash_events/{started['id']}").json()
    assert (event["kind"], event["command"]) == ("BashCommand", "true")
    assert server.http.get(f"/api/bash/bash_events/{uuid.uuid4()}").status_code == 404


def test_env_is_added_and_not_echoed(server: RunningServer) -> None:
    result = server.run('printf %s "$HELLO"', env={"HELLO": "a b'c\"ü"})
    assert result["stdout"] == "a b'c\"ü"
    assert "HELLO" not in str(server.events(kind__eq="BashCommand")[-1].get("env", ""))


def test_commands_see_neither_the_config_nor_the_key_nor_the_server_s_umask(tmp_path: Path) -> None:
    environment = {"HPC_WORKSPACE_SERVER_X": "1", "LEAK": f"x{KEY}", "KEPT": "yes", "LC_ALL": "C"}
    running = RunningServer(tmp_path, environment)
    try:
        seen = running.run("env; umask")["stdout"]
    finally:
        running.stop()
    assert "HPC_WORKSPACE_SERVER" not in seen
    assert KEY not in seen
    assert "KEPT=yes" in seen
    assert "LC_CTYPE" not in seen
    assert seen.endswith("0022\n")


def test_idle_time_is_zero_while_a_command_runs_and_grows_after(server: RunningServer) -> None:
    started = server.start("sleep 66")
    assert server.info()["idle_time"] == 0
    assert server.info()["running_commands"] == 1
    server.http.post(f"/api/bash/bash_commands/{started['id']}/stop")
    assert eventually(lambda: server.info()["idle_time"]) > 0


def test_a_command_that_ends_because_the_server_ends_has_no_result(tmp_path: Path) -> None:
    own = RunningServer(tmp_path)
    answers = []
    body = {"command": "sleep 60"}
    asking = threading.Thread(
        target=lambda: answers.append(own.client().post("/api/bash/execute_bash_command", json=body))
    )
    asking.start()
    eventually(lambda: own.info()["running_commands"])
    own.process.terminate()
    asking.join(10)
    own.stop()
    assert [answer.status_code for answer in answers] == [503]
