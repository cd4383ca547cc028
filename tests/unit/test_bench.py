"""The harness of `make bench`: rounds that turn, goals that are judged, a document that keeps its schema."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from benchmarks.harness import floors, report, worker
from benchmarks.harness.report import (
    Machine,
    Report,
    judge,
    merge_machines,
    read_node_report,
    row_report,
    summarize,
    to_markdown,
)
from benchmarks.harness.rounds import measure_row, profile_row
from benchmarks.harness.rows import ROWS, choose
from benchmarks.harness.values import Contestant, Goal, NotMeasuredError, Row
from benchmarks.harness.worker_process import WorkerError, WorkerProcess
from hpc_workspace.errors import TunnelError

MACHINE = Machine(cpus=2, cpu_model="x", memory_gib=24, kernel="6.1", versions={"Python": "3.13"})
# All that rounds ask of places: the machine's load, and a clock.
PLACES: Any = SimpleNamespace(load=lambda: 0.5, now_s=lambda: 0.0)


def contestant(name: str, role: str, *values: float, calls: list[str] | None = None) -> Contestant:
    """One whose measurements are these, over and over."""
    given = iter(values * 1000)

    def measure(_: object) -> float:
        if calls is not None:
            calls.append(name)
        return next(given)

    return Contestant(name, role, measure)  # type: ignore[arg-type]


def failing(name: str, error: Exception) -> Contestant:
    def measure(_: object) -> float:
        raise error

    return Contestant(name, "peer", measure)


def row(*contestants: Contestant, goals: tuple[Goal, ...] = (), unit: Any = "ms", rounds: int = 4, **more: Any) -> Row:
    return Row("some-row", "some `thing`", unit, "n01", contestants, goals, rounds, **more)


def measured_report(*rows: Row) -> Report:
    rows_told = [row_report(measure_row(each, PLACES)) for each in rows]
    return Report(schema_version=1, began_at="2026-01-01T00:00:00+00:00", took_s=1, machine=MACHINE, rows=rows_told)


def test_every_contestant_is_measured_once_in_each_round_and_none_always_after_the_same_one() -> None:
    calls: list[str] = []
    ours, floor, peer = (contestant(n, r, 1.0, calls=calls) for n, r in (("a", "ours"), ("b", "floor"), ("c", "peer")))
    measured = measure_row(row(ours, floor, peer, rounds=3), PLACES)
    assert calls == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(values) for name, values in measured.samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_warm_ups_are_not_counted() -> None:
    measured = measure_row(row(contestant("a", "ours", 100.0, 1.0), warm_ups=1), PLACES)
    assert measured.samples["a"] == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "error", [NotMeasuredError("it is not there"), TunnelError("no way"), WorkerError("gone"), OSError("disk full")]
)
def test_one_that_cannot_be_measured_is_named_with_the_reason_and_the_others_go_on(error: Exception) -> None:
    measured = measure_row(
        row(contestant("a", "ours", 1.0), failing("b", error), goals=(Goal("ratio", 1, "b"),)), PLACES
    )
    told = row_report(measured)
    assert str(error).split("\n")[0] in (told.contestants[1].not_measured or "")
    assert told.goals[0].verdict == "not measured"
    assert told.contestants[0].figures == summarize([1.0] * 4)


def test_one_that_fails_half_way_has_no_figures_at_all() -> None:
    calls = 0

    def measure(_: object) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError("the disk is full")
        return 1.0

    measured = measure_row(row(contestant("a", "ours", 1.0), Contestant("b", "peer", measure)), PLACES)
    assert "b" not in measured.samples
    assert measured.absent["b"] == "it failed in round 3: the disk is full"


@pytest.mark.parametrize(
    ("goal", "unit", "ours", "other", "verdict"),
    [
        (Goal("figure", 4), "ms", (4.0,), (1.0,), "reached"),
        (Goal("figure", 4), "ms", (4.1,), (1.0,), "lost"),
        (Goal("figure", 4), "1/s", (4.1,), (1.0,), "reached"),
        (Goal("ratio", 0.9, "b"), "MiB/s", (90.0,), (100.0,), "reached"),
        (Goal("ratio", 0.9, "b"), "MiB/s", (89.0,), (100.0,), "lost"),
        (Goal("ratio", 1.1, "b"), "ms", (1.2,), (1.0,), "lost"),
        (Goal("difference", 0.5, "b"), "ms", (1.5,), (1.0,), "reached"),
        (Goal("difference", 0.5, "b"), "ms", (1.6,), (1.0,), "lost"),
        # A machine that slows down is as slow for both: it is the round's own figure that counts.
        (Goal("ratio", 1.1, "b"), "ms", (1.0, 10.0, 100.0, 1000.0), (1.0, 10.0, 100.0, 1000.0), "reached"),
    ],
)
def test_goals(goal: Goal, unit: Any, ours: tuple[float, ...], other: tuple[float, ...], verdict: str) -> None:
    measured = measure_row(row(contestant("a", "ours", *ours), contestant("b", "peer", *other), unit=unit), PLACES)
    assert judge(measured, goal).verdict == verdict


def test_goals_in_words() -> None:
    of = row(contestant("a", "ours", 1.0), contestant("scp", "peer", 1.0), unit="MiB/s")
    assert of.describe(Goal("ratio", 0.9, "scp")) == "at least 0.9 of scp"
    slow = row(contestant("a", "ours", 1.0), contestant("direct", "floor", 1.0))
    assert slow.describe(Goal("figure", 4)) == "at most 4 ms"
    assert slow.describe(Goal("difference", 0.6, "direct")) == "at most 0.6 ms over direct"


@pytest.mark.parametrize(
    "make",
    [
        lambda: row(contestant("a", "ours", 1.0), contestant("a", "peer", 1.0)),
        lambda: row(contestant("a", "peer", 1.0)),
        lambda: row(contestant("a", "ours", 1.0), contestant("b", "ours", 1.0)),
        lambda: row(contestant("a", "ours", 1.0), goals=(Goal("ratio", 1, "nobody"),)),
        lambda: Goal("ratio", 1),
        lambda: Goal("figure", 1, "somebody"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        make()


def test_the_median_and_its_spread() -> None:
    summary = summarize([float(value) for value in range(101)])
    assert (summary.n, summary.median, summary.p5, summary.p95) == (101, 50, 5, 95)
    assert (summarize([3.0, 1.0]).p5, summarize([3.0, 1.0]).p95) == (1, 3)


def test_a_document_keeps_the_schema_beside_it() -> None:
    schema = json.loads(report.SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    peers = (failing("b", NotMeasuredError("not there")), contestant("c", "floor", 1.0))
    goals = (Goal("figure", 4), Goal("ratio", 1, "b"), Goal("difference", 1, "c"))
    document = json.loads(measured_report(row(contestant("a", "ours", 5.0), *peers, goals=goals)).model_dump_json())
    jsonschema.validate(document, schema)
    document["rows"][0]["goals"][0]["verdict"] = "nearly"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_the_schema_is_that_of_the_classes() -> None:
    assert json.loads(report.SCHEMA_FILE.read_text()) == report.schema(), "run python -m benchmarks.harness.report"


def test_the_table_says_what_was_lost_and_what_was_not_measured() -> None:
    missing = failing("b", NotMeasuredError("a | b is\nnot there"))
    goals = (Goal("figure", 4), Goal("ratio", 1, "b"))
    table = to_markdown(measured_report(row(contestant("a", "ours", 5.0), missing, goals=goals)), profiles="profiles")
    line = next(line for line in table.splitlines() if line.startswith("| `some-row`"))
    assert line == (
        "| `some-row`: some `thing` | 5 ms (5 to 5), n 4 | at most 4 ms: **lost**<br>at most 1 of b: not measured "
        "| none | b: not measured: a \\| b is not there |"
    )
    assert "Lost: `some-row`; the profile is in `profiles/some-row.txt`." in table


def test_what_two_nodes_have_installed_is_told_together() -> None:
    other = MACHINE.model_copy(update={"versions": {"Slurm": "24.11"}})
    assert merge_machines([MACHINE, other]).versions == {"Python": "3.13", "Slurm": "24.11"}


def test_rows_that_a_dead_node_did_not_come_to_are_told() -> None:
    first = row(contestant("a", "ours", 1.0), goals=(Goal("figure", 4),))
    second = dataclasses.replace(first, name="other-row")
    lines = [MACHINE.model_dump_json(), row_report(measure_row(first, PLACES)).model_dump_json()]
    rows, machine = read_node_report(lines, [first, second], "the node died")
    assert machine == MACHINE
    assert [each.goals[0].verdict for each in rows] == ["reached", "not measured"]
    assert rows[1].contestants[0].not_measured == "the node died"


def test_rows_of_a_node_that_told_nothing_are_told() -> None:
    (only,), machine = read_node_report([], [row(contestant("a", "ours", 1.0))], "it died")
    assert machine is None
    assert only.contestants[0].not_measured == "it died"


def test_a_profile_names_the_functions_that_took_the_time() -> None:
    def slow_part(_: object) -> float:
        return float(sum(range(1000)))

    assert "slow_part" in profile_row(row(Contestant("a", "ours", slow_part)), PLACES)


def test_the_names_of_rows_are_unique_and_can_be_chosen() -> None:
    assert len({each.name for each in ROWS}) == len(ROWS)
    assert choose() == list(ROWS)
    assert {each.name for each in choose(["import", "help"])} == {"import", "help"}
    assert {each.node for each in choose(["request-*"], "login")} == {"login"}
    assert choose(["nosuch*"]) == []


def test_a_worker_answers_and_tells_its_failures(tmp_path: Path) -> None:
    with WorkerProcess([sys.executable]) as process:
        path = tmp_path / "file"
        process.ask("make_file", path=str(path), mib=3)
        assert path.stat().st_size == 3 * 1024 * 1024
        answer = process.ask("read", source=str(path))
        assert answer["took_s"] > 0
        assert answer["extra_bytes"] < 8 * 1024 * 1024
        with pytest.raises(WorkerError, match="read: FileNotFoundError"):
            process.ask("read", source=str(tmp_path / "nosuch"))
        process.ask("remove", path=str(path))
        assert not path.exists()


def test_a_worker_that_has_ended_is_told() -> None:
    process = WorkerProcess(["false"])
    with pytest.raises(WorkerError, match="has ended"):
        process.ask("remove", path="nosuch")


def test_memory_that_a_worker_takes_is_seen() -> None:
    held: list[bytes] = []
    answer = worker._watched(lambda: held.append(b"x" * (64 * 1024 * 1024)))
    assert 60 < answer["extra_bytes"] / 1024**2 < 80


def test_a_port_of_a_worker_takes_the_file_from_the_one_with_the_nonce(tmp_path: Path) -> None:
    with WorkerProcess([sys.executable]) as process:
        told = process.ask("listen", address="127.0.0.1")
        process.tell("receive", path=str(tmp_path / "got"))
        with floors.tcp_socket("127.0.0.1", told["port"]) as connection:
            connection.sendall(bytes.fromhex(told["nonce"]) + b"content")
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b"."
        process.answer()
        assert (tmp_path / "got").read_bytes() == b"content"

        told = process.ask("listen", address="127.0.0.1")
        process.tell("receive", path=str(tmp_path / "stolen"))
        with floors.tcp_socket("127.0.0.1", told["port"]) as connection:
            connection.sendall(bytes(32) + b"content")
        with pytest.raises(WorkerError, match="stranger"):
            process.answer()
        assert not (tmp_path / "stolen").exists()


def _serve(listener: socket.socket, answer: bytes, seen: list[bytes]) -> None:
    with listener.accept()[0] as connection:
        while data := connection.recv(65536):
            seen.append(data)
            for start in range(0, len(answer), 7):
                connection.sendall(answer[start : start + 7])


@pytest.mark.parametrize("status", ["200 OK", "401 Unauthorized"])
def test_a_raw_post_reads_one_whole_answer_and_takes_only_a_good_one(status: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen: list[bytes] = []
        answer = f"HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\nhello".encode()
        thread = threading.Thread(target=_serve, args=(listener, answer, seen), daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        raw = floors.RawHttp(lambda: floors.tcp_socket("127.0.0.1", port), "/path", {"command": "true"}, "key")
        if status.startswith("200"):
            assert raw.post_s() > 0
            assert raw.post_s() > 0
        else:
            with pytest.raises(OSError, match="401"):
                raw.post_s()
        raw.close()
        thread.join()
    assert seen[0].startswith(b"POST /path HTTP/1.1\r\n")
    assert b"X-Session-API-Key: key\r\n" in seen[0]


def test_a_bare_spawn_is_timed_and_must_end_well() -> None:
    assert 0 < floors.spawned_s(["true"]) < 5
    with pytest.raises(OSError, match="ended with 1"):
        floors.spawned_s(["false"])


def test_calls_at_once_are_counted() -> None:
    both = threading.Barrier(2)
    assert floors.at_once_per_s(lambda: both.wait(10), count=4, at_once=2) > 0


def test_the_kernel_copies(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"content")
    floors.kernel_copy(str(tmp_path / "one"), str(tmp_path / "two"))
    assert (tmp_path / "two").read_bytes() == b"content"


def test_the_command_line_says_which_rows_there_are() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.harness.on_cluster", "nosuch"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "command-true" in ended.stderr or "needs the test cluster" in ended.stderr
