"""A batch on this machine: every task once, its own workspace, the agent's failures told from ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_workspace import Workspace
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
