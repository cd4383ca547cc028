"""What accounting adds to the end of a workspace's job: by whom it was cancelled, and how it ended when squeue forgot.

The test cluster is restarted for it, with slurmdbd: `make test-accounting`.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO, skip_or_fail
from tests.integration.cluster import VENV, Cluster, why_no_cluster
from tests.integration.test_faults import LONG, Client, begun

pytestmark = pytest.mark.accounting


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The real cluster with accounting; afterwards as it was."""
    if reason := why_no_cluster():
        skip_or_fail(reason)
    box = Cluster(REPO)
    box.bring_up(accounting=True)
    yield box
    box.leave()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    """A client whose workspace is in a job of the partition that can be preempted; a command runs there."""
    made = Client(cluster, slurm={"partition": "low"})
    made.do("tell(pid=os.getpid())")
    made.hear("pid")
    made.do(LONG)
    begun(made)
    yield made
    made.kill()
    cluster.run("login", ["scancel", "--quiet", made.job])


def wake(client: Client) -> None:
    """Let a stopped client run again, by way of the nsenter above it, which stopped with it and passes this on."""
    above = client._process.pid
    for pid in Path(f"/proc/{above}/task/{above}/children").read_text().split():
        os.kill(int(pid), signal.SIGCONT)


@pytest.mark.parametrize("user", ["root", "tester"])
def test_a_job_that_is_cancelled_names_who_did_it(cluster: Cluster, client: Client, user: str) -> None:
    cluster.run("login", ["scancel", client.job], user=user)
    error = client.hear("error")
    assert error["kind"] == "JobEndedError", error["text"]
    named = f"Slurm job {client.job} on {client.node} was cancelled by {user} (CANCELLED) under its workspace"
    assert named in error["text"]
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


def test_a_job_that_squeue_has_forgotten_is_told_as_its_real_end(cluster: Cluster, client: Client) -> None:
    """As on a laptop that sleeps meanwhile."""
    cluster.kill("login", client.told["pid"], number=signal.SIGSTOP)
    preempts = cluster.run("login", ["srun", "-p", "high", "-w", client.node, "-N1", "--exclusive", "true"])
    assert preempts.returncode == 0, preempts.stderr
    asks = ["squeue", "--noheader", "--all", "--states=all", f"--jobs={client.job}"]
    script = 'while "$@" 2>/dev/null | grep -q .; do sleep 0.1; done'
    cluster.run("login", ["sh", "-c", script, "sh", *asks])
    assert "Invalid job id" in cluster.run("login", asks).stderr
    wake(client)
    error = client.hear("error")
    assert error["kind"] == "JobEndedError"
    told = f"Slurm job {client.job} on {client.node} was preempted by a job of higher priority (PREEMPTED)"
    assert told in error["text"]
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


ACCOUNT = """
ask() { sacctmgr --immediate --quiet "$@"; }
ask add cluster box
ask add account lab &&
ask add user tester account=lab MaxSubmitJobs=41 &&
ask modify qos normal set MaxSubmitJobsPerUser=42 MaxWall=2-00:00:00
"""


def doctor(cluster: Cluster, **env: str) -> dict[str, dict[str, str]]:
    flags = [f"{name}={value}" for name, value in env.items()]
    said = cluster.run("login", ["env", *flags, f"{VENV}/hpc-workspace", "doctor", "--json"]).stdout
    return {line["name"]: line for line in json.loads(said)["findings"]}


def test_the_doctor_knows_the_accounts_and_what_bounds_them(cluster: Cluster) -> None:
    made = cluster.run("login", ["sh", "-c", ACCOUNT], user="root")
    assert made.returncode == 0, made.stdout + made.stderr
    found = doctor(cluster)
    assert (found["accounting"]["level"], found["accounting"]["found"]) == ("ok", "sacct answers")
    told = found["accounts"]
    assert told["level"] == "ok"
    bounds = "lab, research; MaxSubmitJobs 41, QOS normal: MaxSubmitJobsPU 42, MaxWall 2-00:00:00"
    assert told["found"].startswith(bounds)
    other = doctor(cluster, HPC_WORKSPACE_SLURM_ACCOUNT="nobodys")["accounts"]
    assert other["level"] == "fail"
    assert "nobodys is none of yours: lab" in other["found"]


def test_the_doctor_says_when_the_accounting_is_silent(cluster: Cluster) -> None:
    cluster.call("daemon", "stop", "login", "slurmdbd")
    try:
        found = doctor(cluster)
    finally:
        cluster.call("daemon", "start", "login", "slurmdbd")
    assert found["accounting"]["level"] == "warn"
    assert "sacct fails" in found["accounting"]["found"]
