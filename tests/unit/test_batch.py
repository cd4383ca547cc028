"""What a run's attempts come to, who gets which task, and what of a run's directory is believed."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_workspace.batch.attempt import Job
from hpc_workspace.batch.claimer import Claimer
from hpc_workspace.batch.coordinator import Coordinator, Wanted
from hpc_workspace.batch.outcomes import (
    FAILURE_CLASSES,
    INFRA_CLASSES,
    Attempt,
    AttemptRecord,
    Policy,
    class_of_state,
    judge,
)
from hpc_workspace.batch.report import derive, make_report
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.batch.state import RunReader
from hpc_workspace.batch.supervisor import Pilot
from hpc_workspace.errors import ConfigError
from hpc_workspace.owner import Owner


def ended(number: int, failure: str | None = None, **more: object) -> Attempt:
    status = "failed" if failure else "done"
    record = AttemptRecord(task="t", attempt=number, status=status, failure_class=failure, pilot="p", **more)
    return Attempt(number=number, pilot="p", record=record)


def lost(number: int, failure: str = "preempted") -> Attempt:
    return Attempt(number=number, pilot="p", lost_as=failure)


def running(number: int) -> Attempt:
    return Attempt(number=number, pilot="p")


class TestJudge:
    policy = Policy.of({"agent": 1, "lost": 2, "preempted": 1})

    def test_a_task_without_an_attempt_waits(self) -> None:
        assert judge([], self.policy).state == "waiting"

    def test_a_done_attempt_is_the_end(self) -> None:
        assert judge([ended(1)], self.policy).state == "done"

    def test_the_agents_own_failure_is_tried_again_as_often_as_allowed(self) -> None:
        assert judge([ended(1, "agent")], self.policy).state == "retry"
        assert judge([ended(1, "agent"), ended(2, "agent")], self.policy).state == "failed"
        assert judge([ended(1, "agent")], Policy.of(0)).state == "failed"

    def test_each_class_has_its_own_number(self) -> None:
        mixed = [ended(1, "agent"), lost(2), ended(3, "lost"), ended(4, "lost")]
        assert judge(mixed, self.policy).state == "retry"
        assert judge([*mixed, lost(5)], self.policy).state == "failed"

    def test_what_may_pass_is_not_tried_at_once_and_each_pause_is_twice_as_long(self) -> None:
        policy = Policy(retries={"start": 9}, backoff_s=5)
        tries = [ended(n, "start", started_at=100.0, duration_s=1.0) for n in range(1, 4)]
        assert judge(tries[:1], policy).due_at == 106.0
        assert judge(tries, policy).due_at == 121.0
        assert judge([lost(1)], self.policy).due_at == 0.0

    def test_the_first_attempt_that_is_done_counts_even_if_it_had_been_given_up(self) -> None:
        standing = judge([ended(1), running(2)], self.policy)
        assert (standing.state, standing.attempt.number) == ("done", 1)
        standing = judge([lost(1), ended(2), ended(3)], self.policy)
        assert (standing.state, standing.attempt.number) == ("done", 2)

    def test_one_that_is_granted_a_further_attempt_begins_to_count_anew(self) -> None:
        failed = [ended(1, "agent"), ended(2, "agent")]
        assert judge(failed, self.policy, granted=2).state == "retry"
        assert judge([*failed, running(3)], self.policy, granted=2).state == "running"
        assert judge([*failed, ended(3, "agent")], self.policy, granted=2).state == "retry"
        assert judge([*failed, ended(3, "agent"), ended(4, "agent")], self.policy, granted=2).state == "failed"

    @given(
        st.lists(st.sampled_from([None, *FAILURE_CLASSES]), max_size=12),
        st.dictionaries(st.sampled_from(FAILURE_CLASSES), st.integers(0, 3)),
    )
    def test_a_task_never_gets_more_attempts_than_its_policy_has(self, ends: list, retries: dict) -> None:
        policy, attempts = Policy.of(retries), []
        for number, failure in enumerate(ends, 1):
            if judge(attempts, policy).is_final:
                break
            attempts.append(ended(number, failure))
        for name in FAILURE_CLASSES:
            assert sum(one.failure_class == name for one in attempts) <= policy.retries[name] + 1


def test_a_policy_of_a_class_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'agents' is no failure class; there are agent, task_timeout"):
        Policy.of({"agents": 1})


@pytest.mark.parametrize(
    ("state", "name"),
    [("PREEMPTED", "preempted"), ("NODE_FAIL", "node_fail"), ("TIMEOUT", "time_limit"), ("OUT_OF_MEMORY", "oom"),
     ("CANCELLED", "cancelled"), ("FAILED", "lost"), ("LOST", "lost"), ("", "lost")],
)  # fmt: skip
def test_slurm_s_word_says_what_an_attempt_was_lost_to(state: str, name: str) -> None:
    assert class_of_state(state) == name


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.prepare([{"id": f"t{n}"} for n in range(4)])
    made.write_run({"policy": Policy.of(0).model_dump(), "started_by": "agents:good"})
    return made


def begin_pilot(run: RunDir, name: str, *, owner: str = "", **about: object) -> None:
    run.pilot_dir(name).mkdir()
    run.write_about(name, "pilot", {"name": name, "job": name, "owner": owner, **about})


def finish(run: RunDir, record: AttemptRecord, *, listed: bool = True) -> None:
    run.begin_attempt(record.task, record.attempt)
    run.write_record(record)
    if listed:
        with (run.pilot_dir(record.pilot) / "records.jsonl").open("a") as file:
            file.write(record.model_dump_json() + "\n")


def done(task: str, pilot: str, number: int = 1) -> AttemptRecord:
    return AttemptRecord(task=task, attempt=number, status="done", pilot=pilot, result={"n": number})


class TestRunDir:
    def test_a_claim_is_one_pilots(self, run: RunDir) -> None:
        assert run.claim("t0", 1, "one")
        assert not run.claim("t0", 1, "two")
        assert run.claim("t0", 1, "one"), "as when the server's answer was lost and it was sent again"
        assert run.claimant("t0", 1) == "one"
        assert run.claims() == {"t0": 1}

    def test_all_that_a_run_knows_is_for_this_user_alone(self, run: RunDir) -> None:
        for path in [run.path, *run.path.rglob("*")]:
            assert path.lstat().st_mode & 0o077 == 0 or path.is_symlink()

    def test_more_tasks_can_come_and_none_can_change(self, run: RunDir) -> None:
        run.prepare([{"id": "t0"}, {"id": "new", "n": 1}])
        assert list(run.tasks()) == ["t0", "t1", "t2", "t3", "new"]
        with pytest.raises(ConfigError, match="not what it was"):
            run.prepare([{"id": "new", "n": 2}])

    @pytest.mark.parametrize("name", ["", "../x", "a b", "a\n", "~", "x" * 201, ".hidden"])
    def test_an_id_that_is_no_file_name_is_refused(self, run: RunDir, name: str) -> None:
        with pytest.raises(ConfigError, match="not usable as a file name"):
            run.prepare([{"id": name}])


class TestState:
    def test_what_a_pilot_works_on_runs(self, run: RunDir) -> None:
        begin_pilot(run, "p")
        run.claim("t0", 1, "p")
        state = RunReader(run).read()
        assert state.standings["t0"].state == "running"
        assert state.open_tasks == ["t1", "t2", "t3"]

    def test_what_a_pilot_that_is_gone_had_begun_is_done_again(self, run: RunDir) -> None:
        begin_pilot(run, "p")
        run.claim("t0", 1, "p")
        run.write_about("p", "fate", {"state": "PREEMPTED", "failure_class": "preempted"})
        standing = RunReader(run).read().standings["t0"]
        assert (standing.state, standing.attempt.failure_class) == ("retry", "preempted")

    def test_a_pilot_of_this_machine_that_died_needs_nobody_to_say_so(self, run: RunDir) -> None:
        begin_pilot(run, "p", owner=str(Owner.of(os.getpid())).rsplit(" ", 1)[0] + " 1")
        run.claim("t0", 1, "p")
        assert RunReader(run).read().standings["t0"].state == "retry"

    def test_a_job_that_began_anew_has_left_what_its_earlier_life_had_begun(self, run: RunDir) -> None:
        begin_pilot(run, "7_0")
        run.claim("t0", 1, "7_0")
        run.pilot_dir("7_0.r1").mkdir()
        run.write_about("7_0.r1", "pilot", {"job": "7_0", "restarts": 1, "owner": ""})
        assert RunReader(run).read().standings["t0"].state == "retry"

    def test_a_record_that_its_pilot_had_no_time_to_list_counts(self, run: RunDir) -> None:
        begin_pilot(run, "p")
        run.claim("t0", 1, "p")
        finish(run, done("t0", "p"), listed=False)
        run.write_about("p", "fate", {"failure_class": "node_fail"})
        assert RunReader(run).read().standings["t0"].state == "done"

    def test_half_a_line_is_read_when_it_is_whole(self, run: RunDir) -> None:
        begin_pilot(run, "p")
        run.claim("t0", 1, "p")
        reader, line = RunReader(run), done("t0", "p").model_dump_json() + "\n"
        for piece in (line[:20], line[20:]):
            assert reader.read().standings["t0"].state == "running"
            with (run.pilot_dir("p") / "records.jsonl").open("a") as file:
                file.write(piece)
        assert reader.read().standings["t0"].state == "done"

    def test_the_report_counts_losses_apart(self, run: RunDir) -> None:
        begin_pilot(run, "p")
        for name in ("t0", "t1", "t2"):
            run.claim(name, 1, "p")
        finish(run, done("t0", "p"))
        finish(run, AttemptRecord(task="t1", attempt=1, status="failed", failure_class="agent", pilot="p"))
        run.write_about("p", "ended", {"failure_class": "time_limit"})
        report = make_report(RunReader(run).read())
        assert report.counts == {"done": 1, "agent": 1}
        assert report.missing == ["t2", "t3"]
        assert report.attempts == {"done": 1, "agent": 1, "time_limit": 1}
        assert (report.attempts_lost, report.is_trustworthy) == (1, False)

    def test_what_is_derived_can_be_derived_again(self, run: RunDir) -> None:
        begin_pilot(run, "p")
        run.claim("t0", 1, "p")
        finish(run, done("t0", "p"))
        (run.attempt_dir("t0", 1) / "patch").write_text("diff --git a/x b/x\n")
        derive(run)
        names = ("results.jsonl", "report.json", "preds.jsonl")
        before = {name: (run.path / name).read_bytes() for name in names}
        for name in names:
            (run.path / name).unlink()
        derive(run)
        assert {name: (run.path / name).read_bytes() for name in names} == before
        assert b'"model_patch": "diff --git a/x b/x\\n"' in before["preds.jsonl"]


class TestCoordinator:
    @pytest.fixture
    def coordinator(self, run: RunDir) -> Coordinator:
        pilot = Pilot(Job(agent=lambda w, t: None, options={}), run.path, 1, "/", ())
        return Coordinator(run, pilot, Wanted(pilots=1, slurm=None))

    def test_a_pilot_that_has_only_made_its_directory_is_not_silent(
        self, run: RunDir, coordinator: Coordinator
    ) -> None:
        run.pilot_dir("local-here-1").mkdir()
        run.claim("t0", 1, "local-here-1")
        assert coordinator._look_after(RunReader(run).read()) == 1
        assert run.read_about("local-here-1", "fate") is None

    def test_one_that_gave_no_sign_for_long_is_given_up(self, run: RunDir, coordinator: Coordinator) -> None:
        begin_pilot(run, "local-here-1")
        run.claim("t0", 1, "local-here-1")
        alive = run.pilot_dir("local-here-1") / "alive"
        alive.touch()
        assert coordinator._look_after(RunReader(run).read()) == 1
        os.utime(alive, (0, run.server_time_s() - 121))
        assert coordinator._look_after(RunReader(run).read()) == 0
        assert RunReader(run).read().standings["t0"].state == "retry"


@given(st.integers(1, 60), st.integers(1, 6), st.randoms(use_true_random=False))
def test_many_claimers_give_every_task_once(count: int, claimers: int, order: random.Random) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        run = RunDir(Path(directory, "run"))
        ids = [f"t{n}" for n in range(count)]
        run.prepare([{"id": name} for name in ids])
        working = [Claimer(run, f"p{n}", ids) for n in range(claimers)]
        got: list[str] = []
        while working:
            claimer = order.choice(working)
            if (task := claimer.next_fresh()) is None:
                working.remove(claimer)
            else:
                got.append(task)
        assert sorted(got) == sorted(ids)


def test_claims_cost_few_operations_beyond_one_each(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    ids = [f"t{n}" for n in range(2000)]
    run.prepare([{"id": name} for name in ids])
    claimers = [Claimer(run, f"p{n}-{socket.gethostname()}", ids) for n in range(8)]
    working = list(claimers)
    while working:
        working = [claimer for claimer in working if claimer.next_fresh() is not None]
    assert len(run.claims()) == len(ids)
    assert sum(claimer.misses for claimer in claimers) < 100
    assert sum(claimer.listings for claimer in claimers) < 100


def test_infrastructure_and_agent_are_all_there_is() -> None:
    assert set(Policy().retries) == set(FAILURE_CLASSES)
    assert set(INFRA_CLASSES) < set(FAILURE_CLASSES)
