"""`hpc-workspace batch` with pilots of this machine, as a shell calls it: run, Ctrl-C, come back, try again, cancel."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.contract.terminals import CLI, TIMEOUT_S, Terminal

AGENTS = """
import os

def solve(workspace, task):
    if task.get("fails") and not os.path.exists("mended"):
        raise ValueError("not yet")
    if task.get("holds"):
        # Until the test has seen that it runs, and has let it go on.
        with open(f"begun-{task['id']}", "wb"):
            pass
        workspace.execute_command(f"cat {os.path.abspath('gate')}", timeout=120)
    return workspace.execute_command(f"echo {task['id']}").stdout.strip()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an agent, in which the commands are called."""
    (tmp_path / "agents.py").write_text(AGENTS)
    os.mkfifo(tmp_path / "gate")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_tasks(*tasks: dict[str, Any]) -> None:
    Path("tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))


RUN = ("batch", "run", "agents:solve", "tasks.jsonl", "--run-dir", "run", "--runtime", "process")


def call(*arguments: str, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd)
    assert "Traceback" not in ended.stderr
    return ended


def results() -> dict[str, Any]:
    lines = map(json.loads, Path("run/results.jsonl").read_text().splitlines())
    return {line["task"]: line["failure_class"] or line["result"] for line in lines}


def is_working() -> bool:
    """Whether any process works on this run."""
    mark = os.fsencode(Path("run/jobs").absolute())
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "cmdline").read_bytes():
                return True
        except OSError:
            continue  # it is gone
    return False


def wait_until(is_so: Callable[[], bool]) -> None:
    import time

    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline_s, "it never became so"


def test_a_run_its_status_and_another_chance_for_what_failed(here: Path) -> None:
    write_tasks({"id": "a"}, {"id": "b", "fails": True}, {"id": "c"})
    ended = call(*RUN, "--workspaces-per-pilot", "2", "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["counts"] == {"done": 2, "agent": 1}
    assert "3/3 tasks: done 2, failed 1; failed as agent 1" in ended.stderr
    assert "\x1b" not in ended.stderr
    assert results() == {"a": "a", "b": "agent", "c": "c"}

    status = json.loads(call("batch", "status", "run", "--json").stdout)
    assert (status["counts"]["done"], status["failures"], status["left_s"]) == (2, {"agent": 1}, 0.0)
    assert "failed as: agent 1" in call("batch", "status", "run").stdout
    assert "3/3 tasks" in call("batch", "watch", "run").stderr

    Path("mended").touch()
    # From anywhere: the run knows where it was begun.
    again = call("batch", "retry", str(here / "run"), "--class", "agent", cwd="/")
    assert again.returncode == 0, again.stderr
    assert "1 task to be tried again" in again.stderr
    assert results() == {"a": "a", "b": "b", "c": "c"}


def test_ctrl_c_ends_the_pilots_in_good_order_and_resume_goes_on(here: Path) -> None:
    write_tasks({"id": "a", "holds": True}, {"id": "b", "holds": True})
    with Terminal(*RUN, "--pilots", "2", "--no-smoke", columns=80) as terminal:
        terminal.read_until(b"slowest")
        wait_until(lambda: Path("begun-a").exists() and Path("begun-b").exists())
        terminal.type(b"\x03")
        assert b"run" in terminal.read_until(b"batch resume")
        code, is_as_before = terminal.wait()
    assert (code, is_as_before) == (130, True)
    wait_until(lambda: not is_working())
    whys = [json.loads(path.read_text())["why"] for path in Path("run/pilots").glob("*/ended.json")]
    assert set(whys) == {"terminated"}
    assert results() == {}, "a task that was cut short has no result"
    write_gate_for_ever()
    resumed = call("batch", "resume", "run")
    assert resumed.returncode == 0, resumed.stderr
    assert results() == {"a": "a", "b": "b"}


def test_cancel_ends_the_pilots_and_whoever_tops_them_up(here: Path) -> None:
    write_tasks({"id": "a", "holds": True}, {"id": "b"})
    running = subprocess.Popen([*CLI, *RUN, "--no-smoke"], stderr=subprocess.PIPE, text=True)
    wait_until(Path("begun-a").exists)
    cancelled = call("batch", "cancel", "run", "--json")
    assert cancelled.returncode == 0, cancelled.stderr
    said = json.loads(cancelled.stdout)
    assert (len(said["ended"]), said["jobs"], said["left"]) == (1, [], {})
    assert said["open"] in (1, 2)
    _, errors = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    assert "The run was cancelled" in errors
    assert not is_working()
    assert "No pilot works on it" in call("batch", "status", "run").stdout.replace("\n", " ")
    write_gate_for_ever()
    assert call("batch", "resume", "run").returncode == 0
    assert results() == {"a": "a", "b": "b"}


def test_an_agent_that_is_not_there_is_said_and_nothing_is_started(here: Path) -> None:
    write_tasks({"id": "a"})
    ended = call("batch", "run", "nowhere:solve", "tasks.jsonl", "--run-dir", "run", "--runtime", "process")
    assert ended.returncode == 255
    assert ended.stderr.splitlines()[-3].endswith("The agent nowhere:solve can't be imported.")
    assert not is_working()


def write_gate_for_ever() -> None:
    """From now on whoever waits at the gate is let through."""
    Path("gate").unlink()
    Path("gate").touch()
