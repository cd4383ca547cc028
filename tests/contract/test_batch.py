"""A batch on this machine: every task once, its own workspace, the agent's failures told from ours."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_workspace import Workspace, clock
from hpc_workspace.batch import evaluate
from hpc_workspace.errors import ConfigError


def agent(workspace: Workspace, task: dict[str, Any]) -> dict[str, Any]:
    if task["id"] == "bad":
        raise ValueError("the agent gave up")
    count = workspace.execute_command("touch seen; ls | wc -l").stdout.strip()
    return {"files": count, "said": workspace.execute_command(f"echo {task['word']}").stdout.strip()}


def test_every_task_gets_a_line_and_a_second_call_runs_none_again(tmp_path: Path) -> None:
    tasks = [{"id": f"t{n}", "word": n} for n in range(3)] + [{"id": "bad", "word": ""}]
    report = evaluate(agent, tasks, run_dir=tmp_path / "run", runtime="process", pilots=2, workspaces_per_pilot=2)
    assert report.counts == {"done": 3, "agent": 1}
    assert report.missing == []
    lines = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert {line["task"]: line["result"] for line in lines if line["status"] == "done"} == {
        f"t{n}": {"files": "1", "said": str(n)} for n in range(3)
    }
    assert "the agent gave up" in next(line for line in lines if line["task"] == "bad")["error"]
    again = evaluate(agent, tasks, run_dir=tmp_path / "run", runtime="process")
    assert again == report


def test_a_task_without_a_usable_id_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not usable"):
        evaluate(agent, [{"id": "../x"}], run_dir=tmp_path / "run", runtime="process")


async def polite(workspace: Workspace, task: dict[str, Any]) -> str:
    return workspace.execute_command(f"echo {task['id']}").stdout.strip()


def test_an_async_agent_by_its_import_path(tmp_path: Path) -> None:
    name = "tests.contract.test_batch:polite"
    (tmp_path / "tasks.jsonl").write_text('{"id": "a"}\n\n{"id": "b"}\n')
    report = evaluate(name, tmp_path / "tasks.jsonl", run_dir=tmp_path / "run", runtime="process")
    assert {line["task"]: line["result"] for line in report.results} == {"a": "a", "b": "b"}
    assert report.is_trustworthy


def at_the_second(workspace: Workspace, task: dict[str, Any]) -> int:
    marks = Path(task["marks"])
    seen = len(list(marks.iterdir()))
    (marks / str(seen)).touch()
    if not seen:
        raise RuntimeError("not at once")
    return seen + 1


def test_what_the_agent_failed_is_tried_again_as_often_as_was_asked(tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    tasks = [{"id": "t", "marks": str(tmp_path / "marks")}]
    report = evaluate(at_the_second, tasks, run_dir=tmp_path / "run", runtime="process", retries=1)
    assert [(line["attempt"], line["result"]) for line in report.results] == [(2, 2)]
    assert report.attempts == {"agent": 1, "done": 1}
    first = tmp_path / "run/attempts/t/1"
    assert json.loads((first / "record.json").read_text())["failure_class"] == "agent"


def test_a_result_that_is_no_json_is_the_agents_failure(tmp_path: Path) -> None:
    report = evaluate(lambda w, t: {1, 2}, [{"id": "t"}], run_dir=tmp_path / "run", runtime="process")
    assert report.counts == {"agent": 1}
    assert "not JSON serializable" in report.results[0]["error"]


WAITS = """
import sys
from pathlib import Path
from hpc_workspace.batch import evaluate

def agent(workspace, task):
    return workspace.execute_command(f"echo {task['id']}; cat {task['gate']}", timeout=60).stdout

tasks = [{"id": f"t{n}", "gate": sys.argv[2]} for n in range(3)]
report = evaluate(agent, tasks, run_dir=sys.argv[1], runtime="process", workspaces_per_pilot=2, smoke=False)
print(sorted((line["task"], line["attempt"]) for line in report.results), report.counts)
"""


def test_a_client_that_was_killed_comes_back_to_pilots_that_went_on(tmp_path: Path) -> None:
    """And no attempt was made twice."""
    run, gate = tmp_path / "run", tmp_path / "gate"
    os.mkfifo(gate)
    argv = [sys.executable, "-c", WAITS, str(run), str(gate)]
    with subprocess.Popen(argv) as first:
        wait_until(lambda: len(list(run.glob("claims/*"))) == 2, first)
        first.kill()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as second:
        while second.poll() is None:
            with contextlib.suppress(OSError):  # nobody waits at the gate just now
                os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
            clock.sleep(0.05)
        said = second.stdout.read() if second.stdout else ""
    assert said == "[('t0', 1), ('t1', 1), ('t2', 1)] {'done': 3}\n"


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not is_so():
        assert process.poll() is None
        clock.sleep(0.02)
