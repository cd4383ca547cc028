"""Slurm's words in ours: why a job waits and why it ended, which options are its own, and the watch over open jobs."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_workspace import ApptainerWorkspace, SlurmOptions
from hpc_workspace.errors import ConfigError, SchedulerUnavailableError
from hpc_workspace.launch import slurm
from hpc_workspace.launch.reasons import explain_end, explain_pending
from hpc_workspace.launch.slurm_commands import JobStatus, named_options
from hpc_workspace.launch.watch import Watch
from hpc_workspace.rendezvous import WorkspaceDirectory


@pytest.mark.parametrize(
    ("word", "text", "never"),
    [
        ("Resources", "waits for free resources", False),
        ("ReqNodeNotAvail, UnavailableNodes:n01", "a node that it asks for is down, drained or reserved", False),
        ("JobHeldUser", "it is held", True),
        ("DependencyNeverSatisfied", "the job that it depends on failed", True),
        ("PartitionTimeLimit", "its time limit is above its partition's", True),
        ("QOSMaxCpuPerJobLimit", "it asks for more than its QOS allows one job", True),
        ("AssocMaxWallDurationPerJobLimit", "it asks for more than its account allows one job", True),
        ("AssocGrpCpuLimit", "all jobs of its account together have used up what its account allows", False),
        ("QOSMaxJobsPerUserLimit", "you have used up what its QOS allows", False),
        ("SomethingOfALaterSlurm", "", False),
    ],
)
def test_a_pending_reason_in_english_says_whether_waiting_helps(word: str, text: str, never: bool) -> None:
    reason = explain_pending(word)
    assert (reason.text, reason.never_resolves) == (text, never)


def test_an_end_has_slurms_word_and_who_cancelled() -> None:
    assert explain_end("OUT_OF_MEMORY") == "used more memory than it had asked for (OUT_OF_MEMORY)"
    assert explain_end("CANCELLED", "0") == "was cancelled by root (CANCELLED)"
    assert explain_end("CANCELLED", "3999999999") == "was cancelled by user 3999999999 (CANCELLED)"
    assert explain_end("NEW_WORD") == "ended (NEW_WORD)"


def _describe(tmp_path: Path, status: JobStatus) -> str:
    launched = slurm.SlurmLaunched(WorkspaceDirectory(tmp_path), status.job_id, "python3")
    launched._last = status
    return launched.describe()


def test_a_waiting_job_is_described_with_reason_and_expected_start(tmp_path: Path) -> None:
    waiting = JobStatus("7", "PENDING", reason="Resources", start="2026-11-24T21:30:00")
    assert _describe(tmp_path, waiting) == (
        "Slurm job 7: PENDING, waits for free resources (Resources); Slurm expects it to start at 2026-11-24T21:30:00"
    )
    held = JobStatus("7", "PENDING", reason="JobHeldUser", start="N/A")
    assert "Waiting does not help: scontrol release JOB" in _describe(tmp_path, held)
    assert _describe(tmp_path, JobStatus("7", "RUNNING", "n01", "None")) == "Slurm job 7: RUNNING"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"extra": {"wrap": "id"}}, "set by hpc-workspace itself"),
        ({"extra": {"--job_name": "x"}}, "set by hpc-workspace itself"),
        ({"extra": {"mem": "1G"}}, "give mem="),
        ({"extra": {"a b": "x"}}, "not the name of a long option"),
        ({"gres": "gpu:"}, "gres"),
        ({"mem": "1G", "mem_per_gpu": "1G"}, "contradict"),
        ({"tmp": "much"}, "tmp"),
        ({"nice": "very"}, "nice"),
    ],
)
def test_an_option_that_sbatch_would_refuse_or_that_is_ours_is_named(values: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SlurmOptions(**values)


def test_flags_have_no_value_and_false_is_left_out() -> None:
    assert named_options(SlurmOptions(exclusive=True, nice=0)) == {"exclusive": None, "nice": 0}
    assert named_options(SlurmOptions(exclusive=False, gres="gpu:a100:2,shard")) == {"gres": "gpu:a100:2,shard"}
    assert named_options(SlurmOptions(exclusive="user")) == {"exclusive": "user"}


def test_a_dry_run_prints_sbatch_and_script_and_leaves_nothing(tmp_path: Path) -> None:
    options = SlurmOptions(partition="a b", setup=["module load apptainer"], python="/shared/my venv/bin/python")
    text = ApptainerWorkspace(image="x.sif", slurm=options).dry_run()
    first, *script = text.splitlines()
    assert first.startswith("# sbatch --parsable --job-name=hpcws-ID")
    assert "'--partition=a b'" in first
    assert script[0] == "#!/bin/bash"
    assert "module load apptainer" in script
    assert script[-1].startswith("exec -- '/shared/my venv/bin/python' -m hpc_workspace.node ")
    assert list(tmp_path.iterdir()) == []


def test_the_sites_word_holds_where_the_user_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "site.toml"
    file.write_text(
        '[workspace]\nconnect = "openssh"\nidle_timeout = "1h"\n'
        '[slurm]\npartition = "cpu"\naccount = "proj"\nmem = "4G"\nsetup = ["module load apptainer"]\n'
    )
    monkeypatch.setenv("HPC_WORKSPACE_CONFIG", str(file))
    options = ApptainerWorkspace(image="x.sif", slurm=SlurmOptions(partition="gpu", mem_per_cpu="1G")).options
    assert (options.connect, options.idle_timeout) == ("openssh", 3600)
    assert isinstance(options.slurm, SlurmOptions)
    found = options.slurm.model_dump(exclude_none=True, exclude_defaults=True)
    assert found == {
        "partition": "gpu", "account": "proj", "mem_per_cpu": "1G", "setup": ["module load apptainer"],
    }  # fmt: skip
    monkeypatch.setenv("HPC_WORKSPACE_SLURM_ACCOUNT", "other")
    again = ApptainerWorkspace(image="x.sif", connect="loopback", slurm=SlurmOptions()).options
    assert again.connect == "loopback"
    assert isinstance(again.slurm, SlurmOptions)
    assert (again.slurm.account, again.slurm.mem) == ("other", "4G")


class _Job:
    """A job whose news are told by the test."""

    def __init__(self) -> None:
        self.news: Callable[[], None] | None = None
        self.looks = 0
        self.looked_twice = threading.Event()

    def find_news(self) -> Callable[[], None] | None:
        self.looks += 1
        if self.looks == 2:
            self.looked_twice.set()
        if self.looks == 1:
            raise SchedulerUnavailableError("silent")
        return self.news


def test_the_watch_acts_on_news_and_never_on_silence() -> None:
    watch = Watch(at_rest_s=0.01)
    job, other = _Job(), _Job()
    acted: list[str] = []
    heard = threading.Event()
    watch.add(other)
    watch.add(job)
    assert job.looked_twice.wait(10)
    assert acted == []

    def act() -> None:
        watch.remove(job)
        acted.append("job")
        heard.set()

    job.news = act
    assert heard.wait(10)
    watch.remove(other)
    other.news = lambda: acted.append("other")
    seen = other.looks
    watch.add(job)  # the thread has ended, or takes it on: either way it is watched again
    assert other.looks <= seen + 1
    watch.remove(job)
    assert set(acted) == {"job"}


def test_the_watch_leaves_one_alone_whose_news_are_being_acted_on() -> None:
    watch = Watch(at_rest_s=0.01)
    job, other = _Job(), _Job()
    begun, done = threading.Event(), threading.Event()
    times: list[int] = []

    def act() -> None:
        times.append(1)
        begun.set()
        done.wait(10)
        watch.remove(job)

    job.news = act
    watch.add(job)
    assert begun.wait(10)
    watch.add(other)
    assert other.looked_twice.wait(10)
    assert times == [1]
    done.set()
    watch.remove(other)


def test_the_watch_keeps_nobody_alive() -> None:
    watch = Watch(at_rest_s=0.01)
    job, other = _Job(), _Job()
    watch.add(job)
    watch.add(other)
    assert other.looked_twice.wait(10)
    gone = weakref.ref(job)
    del job
    seen = other.looks
    while other.looks == seen:
        threading.Event().wait(0.01)
    gc.collect()
    assert gone() is None
    watch.remove(other)


TERMED = """
import os, signal, sys
from hpc_workspace import exits
own = sys.argv[1] == "own"
if own:
    signal.signal(signal.SIGTERM, lambda *_: print("own handler") or sys.exit(3))
exits.make_orderly()
try:
    if sys.argv[1] == "undone":
        exits.make_default_again()
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
finally:
    print("closed", flush=True)
"""


@pytest.mark.parametrize(
    ("how", "code", "output"), [("orderly", 143, "closed\n"), ("own", 3, "own handler\nclosed\n"), ("undone", -15, "")]
)
def test_a_term_closes_what_is_open_unless_the_program_knows_better(how: str, code: int, output: str) -> None:
    ended = subprocess.run([sys.executable, "-c", TERMED, how], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (code, output)


def test_a_watch_that_was_left_and_taken_up_again_rests_between_its_looks() -> None:
    watch = Watch(at_rest_s=3600)
    first, second = _Job(), _Job()
    watch.add(first)
    watch.remove(first)
    watch.add(second)
    thread = watch._thread
    assert thread is not None
    thread.join(0.2)
    assert second.looks <= 1


def test_a_silent_controller_is_asked_once_for_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a squeue that counts its calls and fails as it does when the controller does not answer."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    view = slurm.JobView()
    for job in range(20):
        with pytest.raises(SchedulerUnavailableError):
            view.status(str(job))
    assert (tmp_path / "calls").read_text() == "x\n"
