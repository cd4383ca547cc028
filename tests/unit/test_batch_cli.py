"""`hpc-workspace batch` on runs that are only files: what it shows, whom it gives another chance, what it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hpc_workspace.batch.cancel import cancel, cancellation
from hpc_workspace.batch.outcomes import AttemptRecord, Policy
from hpc_workspace.batch.report import Report
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.batch.state import RunReader
from hpc_workspace.cli.batch import choose_failed, why_not
from hpc_workspace.cli.batch_overview import Looker, Overview, PilotLine, TaskLine
from hpc_workspace.cli.batch_shown import as_line, make_table
from hpc_workspace.cli.commands import cli
from hpc_workspace.errors import ConfigError
from hpc_workspace.launch.slurm import view
from hpc_workspace.owner import Owner


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """t0 is done, t1 failed as agent, t2 as task_timeout, t3 runs, t4 waits; one local pilot works."""
    made = RunDir(tmp_path / "run")
    made.prepare([{"id": f"t{n}"} for n in range(5)])
    made.write_run({"policy": Policy.of(0).model_dump(), "started_by": "agents:good"})
    made.pilot_dir("p").mkdir()
    owner = str(Owner.of(os.getpid()))
    made.write_about("p", "pilot", {"job": "local-here-1", "owner": owner, "node": "here", "slots": 2})
    for name, failure in (("t0", None), ("t1", "agent"), ("t2", "task_timeout"), ("t3", "")):
        made.claim(name, 1, "p")
        if failure != "":
            finish(made, name, failure)
    return made


def finish(run: RunDir, task: str, failure: str | None) -> None:
    record = AttemptRecord(
        task=task,
        attempt=1,
        status="failed" if failure else "done",
        failure_class=failure,
        pilot="p",
        started_at=1000.0 + int(task[1:]),
        duration_s=10.0,
    )
    run.begin_attempt(task, 1)
    run.write_record(record)
    with (run.pilot_dir("p") / "records.jsonl").open("a") as file:
        file.write(record.model_dump_json() + "\n")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["batch", *map(str, arguments)])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A squeue that prints `jobs`, and a scancel that notes what it is told in `cancelled`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "squeue").write_text(f"#!/bin/sh\ncat {folder}/jobs\n")
    (folder / "scancel").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>{folder}/cancelled\n')
    for name in ("squeue", "scancel"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    view.forget()
    yield folder
    view.forget()


def overview(**more: Any) -> Overview:
    counts = {"waiting": 150, "running": 8, "retry": 2, "done": 30, "failed": 10}
    return Overview(200, counts, {"agent": 9, "image": 1}, {"preempted": 4}, 480.0, **more)


def shown(of: Overview, columns: int = 80) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=columns)
    console.print(make_table("run  agents:good", of, pilots_max=2))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= columns
    return str(text)


class TestOverview:
    def test_it_counts_by_state_and_by_class(self, run: RunDir) -> None:
        seen = Looker(run).look(RunReader(run).read())
        assert seen.counts == {"waiting": 1, "running": 1, "retry": 0, "done": 1, "failed": 2}
        assert (seen.failures, seen.finished, seen.open_tasks) == ({"agent": 1, "task_timeout": 1}, 3, 2)
        assert [(one.task, one.state) for one in seen.latest] == [
            ("t2", "task_timeout"),
            ("t1", "agent"),
            ("t0", "done"),
        ]
        assert [one.task for one in seen.slowest] == ["t3"]
        assert [(one.name, one.state, one.busy, one.slots) for one in seen.pilots] == [("p", "running", 1, 2)]

    def test_what_is_left_goes_by_the_latest_attempts_and_the_slots(self, run: RunDir) -> None:
        # Two are open, one of them half done, each takes 10 s, and there are two slots.
        assert Looker(run).look(RunReader(run).read()).left_s == 7.5
        run.write_about("p", "ended", {"why": "no tasks"})
        assert Looker(run).look(RunReader(run).read()).left_s is None, "nobody works on it"

    def test_a_run_that_nobody_works_on_says_how_to_go_on(self, run: RunDir) -> None:
        run.write_about("p", "ended", {"why": "terminated", "failure_class": "cancelled"})
        state = RunReader(run).read()
        assert "batch resume" in Looker(run).look(state).notice
        assert Looker(run, is_coordinated=True).look(state).notice == ""

    def test_a_job_that_waits_says_why_and_one_that_slurm_ended_is_not_running(self, run: RunDir, slurm: Path) -> None:
        jobs = [f"7_{n}" for n in range(3)]
        run.note_submission({"jobs": jobs, "kind": "slurm", "submitted_at": 1.0})
        run.pilot_dir("7_1").mkdir()
        run.write_about("7_1", "pilot", {"job": "7_1", "node": "n01", "slots": 4})
        from hpc_workspace.launch.slurm_commands import _SEPARATOR

        rows = [("7_0", "PENDING", "", "Resources", ""), ("7_1", "NODE_FAIL", "n01", "", "")]
        (slurm / "jobs").write_text("".join(_SEPARATOR.join(row) + "\n" for row in rows))
        pilots = {one.job: one for one in Looker(run).look(RunReader(run).read()).pilots}
        assert (pilots["7_0"].state, pilots["7_0"].why) == ("queued", "waits for free resources (Resources)")
        assert pilots["7_1"].state == "node_fail"
        assert "7_2" not in pilots, "nobody knows it any more"

    def test_a_slurm_that_does_not_answer_is_said_and_no_pilot_is_taken_for_dead(
        self, run: RunDir, slurm: Path
    ) -> None:
        run.note_submission({"jobs": ["7_0"], "kind": "slurm", "submitted_at": 1.0})
        (slurm / "squeue").write_text("#!/bin/sh\necho slow >&2; exit 1\n")
        seen = Looker(run).look(RunReader(run).read())
        assert seen.notice.startswith("Slurm does not answer")
        assert [one.state for one in seen.pilots if one.job == "7_0"] == ["queued"]


class TestShown:
    def test_a_line_has_all_of_it(self) -> None:
        queued = [PilotLine(f"7_{n}", f"7_{n}", "queued", why="waits for free resources (Resources)") for n in range(2)]
        line = as_line(overview(pilots=[PilotLine("7_9", "7_9", "running"), *queued]))
        assert line == (
            "40/200 tasks: waiting 150, running 8, retry 2, done 30, failed 10; failed as agent 9, image 1; "
            "1 pilot, 2 queued (waits for free resources (Resources)); about 8m left"
        )

    def test_a_job_that_slurm_has_not_looked_at_yet_is_queued_and_no_more(self) -> None:
        assert "; 0 pilots, 1 queued; " in as_line(overview(pilots=[PilotLine("7_0", "7_0", "queued")]))

    def test_the_table_fits_80_columns_whatever_the_names(self) -> None:
        pilots = [PilotLine(f"{n}" * 60, "j", "queued", why="a very long reason " * 9) for n in range(5)]
        text = shown(overview(pilots=pilots, slowest=[TaskLine("x" * 200, 1, "running", 90.0, "n01")], notice="note"))
        for wanted in ("40/200  20 %", "about 8m left", "failed as: agent 9, image 1", "preempted 4", "note", "3 more"):
            assert wanted in text

    def test_what_looks_like_markup_is_shown_as_it_is(self) -> None:
        assert "[red]x[/red]" in shown(overview(pilots=[PilotLine("[red]x[/red]", "j", "running")]))

    def test_pilots_that_ended_well_are_a_number(self) -> None:
        ended = [PilotLine(f"p{n}", "j", "ended") for n in range(40)]
        text = shown(overview(pilots=[*ended, PilotLine("bad", "j", "node_fail", "n01")]))
        assert "40 ended in good order" in text
        assert "node_fail" in text
        assert "p7" not in text


class TestRetry:
    def test_by_class(self, run: RunDir) -> None:
        state = RunReader(run).read()
        assert choose_failed(state, ("agent",), ()) == {"t1": 1}
        assert choose_failed(state, ("agent", "task_timeout"), ()) == {"t1": 1, "t2": 1}

    def test_by_id_and_by_both(self, run: RunDir) -> None:
        state = RunReader(run).read()
        assert choose_failed(state, (), ("t2",)) == {"t2": 1}
        with pytest.raises(ConfigError, match=r"(?s)'t2' is not one that failed so.*failed task_timeout"):
            choose_failed(state, ("agent",), ("t2",))

    @pytest.mark.parametrize(
        ("classes", "ids", "said"),
        [((), (), "Nothing says which"), (("agents",), (), "is no failure class"), (("oom",), (), "No task failed as oom"),
         ((), ("t0",), "It is done"), ((), ("t3",), "It is running"), ((), ("x",), "It is not there")],
    )  # fmt: skip
    def test_what_can_t_be_meant_is_refused(self, run: RunDir, classes: Any, ids: Any, said: str) -> None:
        with pytest.raises(ConfigError) as caught:
            choose_failed(RunReader(run).read(), classes, ids)
        assert said in str(caught.value)


class TestReport:
    def test_it_derives_the_files_and_a_run_that_is_not_finished_exits_1(self, run: RunDir) -> None:
        ended = call("report", run.path)
        assert ended.exit_code == 1
        assert "2 tasks have no result yet (t3, t4)" in ended.stderr
        assert ended.stdout.splitlines()[:3] == [
            "done                1",
            "agent               1",
            "task_timeout        1",
        ]
        assert len((run.path / "results.jsonl").read_text().splitlines()) == 3
        assert json.loads(call("report", run.path, "--json").stdout)["counts"] == {
            "done": 1,
            "agent": 1,
            "task_timeout": 1,
        }

    def test_failures_of_the_agent_are_a_result_and_exit_0(self, run: RunDir) -> None:
        finish(run, "t3", "agent")
        run.claim("t4", 1, "p")
        finish(run, "t4", None)
        assert call("report", run.path).exit_code == 0

    def test_too_many_losses_are_said(self) -> None:
        results = [{"failure_class": name} for name in (None, "node_fail", "agent", None)]
        assert why_not(Report(results, [], max_infra_loss=0.1)) == (
            "1 of 4 tasks were lost to the infrastructure, 25.0% where 10.0% may be"
        )
        assert why_not(Report(results, [], max_infra_loss=0.25)) == ""


class TestCancel:
    def test_all_jobs_of_all_submissions_that_have_not_ended_are_cancelled(self, run: RunDir, slurm: Path) -> None:
        run.write_about("p", "ended", {})
        run.note_submission({"jobs": ["7_0", "7_1"], "kind": "slurm", "submitted_at": 1.0})
        run.note_submission({"jobs": ["9_0"], "kind": "slurm", "submitted_at": 2.0})
        run.pilot_dir("7_1").mkdir()
        run.write_about("7_1", "pilot", {"job": "7_1"})
        run.write_about("7_1", "ended", {"why": "no tasks"})
        ended = call("cancel", run.path)
        assert ended.exit_code == 0
        told = (slurm / "cancelled").read_text().split()
        assert [word for word in told if word[0].isdigit()] == ["7_0", "9_0"]
        assert ended.stdout == "cancelled  7_0\ncancelled  9_0\n"
        assert "2 of 5 tasks stay open" in ended.stderr

    def test_a_pilot_of_this_machine_is_told_to_end_and_waited_for(self, run: RunDir) -> None:
        run.write_about("p", "ended", {})
        process = subprocess.Popen(
            [sys.executable, "-c", "import signal; print(1, flush=True); signal.pause()"],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        run.pilot_dir("q").mkdir()
        run.write_about("q", "pilot", {"job": "local-here-2", "owner": str(Owner.of(process.pid))})
        assert cancel(run).ended == ["q"]
        process.wait(10)

    def test_a_process_that_only_has_the_pilot_s_number_is_left_alone(self, run: RunDir) -> None:
        run.write_about("p", "ended", {})
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
            owner = Owner.of(process.pid)
            run.pilot_dir("q").mkdir()
            earlier = f"{owner.node} {owner.boot_id} {owner.pid_namespace} {owner.pid} {owner.start_ticks - 1}"
            run.write_about("q", "pilot", {"job": "local-here-2", "owner": earlier})
            assert cancel(run).ended == []
            assert process.poll() is None

    def test_a_pilot_of_another_machine_is_named_and_the_exit_code_says_so(self, run: RunDir) -> None:
        run.write_about("p", "ended", {})
        here = Owner.of(os.getpid())
        run.pilot_dir("q").mkdir()
        owner = f"elsewhere+1 {here.boot_id} {here.pid_namespace} {here.pid} {here.start_ticks}"
        run.write_about("q", "pilot", {"job": "local-elsewhere-2", "owner": owner, "node": "elsewhere"})
        ended = call("cancel", run.path, "--json")
        assert ended.exit_code == 1
        assert json.loads(ended.stdout)["left"] == {"q": "it is on elsewhere: run this there"}

    def test_whoever_tops_up_can_see_it(self, run: RunDir) -> None:
        run.write_about("p", "ended", {})
        before = cancellation(run)
        cancel(run)
        first = cancellation(run)
        cancel(run)
        assert len({before, first, cancellation(run)}) == 3


@pytest.mark.parametrize("command", ["status", "watch", "resume", "retry", "report", "cancel"])
def test_a_directory_without_a_run_is_said_without_a_traceback(command: str, tmp_path: Path) -> None:
    ended = call(command, tmp_path)
    assert isinstance(ended.exception, ConfigError)
    assert "is no run's directory" in str(ended.exception)


@pytest.mark.parametrize("command", ["resume", "retry"])
def test_a_run_of_a_program_is_gone_on_with_by_the_program(command: str, run: RunDir) -> None:
    ended = call(command, run.path, *(["--class", "agent"] if command == "retry" else []))
    assert "not begun from the command line" in str(ended.exception)
    assert "agents:good" in str(ended.exception)
    assert not run.grants()


@pytest.mark.parametrize(
    ("option", "said"),
    [("--retries=many", "neither a number nor CLASS=NUMBER"), ("--retry=agents=1", "is no failure class"),
     ("--partition=cpu", "without --slurm"), ("--task-timeout=soon", "task_timeout is not valid"),
     ("--memory-per-workspace=x", "memory_per_workspace is not valid"), ("--pilots=0", "pilots is 0")],
)  # fmt: skip
def test_an_option_that_is_wrong_starts_nothing(option: str, said: str, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a"}\n')
    ended = call("run", "agents:good", tasks, "--run-dir", tmp_path / "run", "--runtime", "process", option)
    assert isinstance(ended.exception, ConfigError)
    assert said in str(ended.exception)
    assert not (tmp_path / "run").exists()


def test_tasks_of_which_only_some_have_an_image_are_refused(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"id": "a", "image": "a.sif"}\n{"id": "b"}\n')
    ended = call("run", "agents:good", tasks, "--run-dir", tmp_path / "run")
    assert "1 of 2 tasks have no image.\nThe first of them is 'b'." in str(ended.exception)
