"""Commands that were started, across what happens to clients and jobs on the cluster."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.integration.cluster import PRELUDE, SERVER, TINY, TOLD, VENV, Cluster
from tests.integration.test_faults import Client
from tests.integration.test_restarts import has_begun, requeue

pytestmark = pytest.mark.cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    cluster.run("login", ["sh", "-c", "rm -rf ~/kept && mkdir -p ~/kept"])
    made = Client(cluster, slurm={"partition": "low", "requeue": True}, mount_dir="/home/tester/kept")
    yield made
    made.kill()
    cluster.run("login", ["scancel", "--quiet", made.job])
    cluster.run("login", ["sh", "-c", "rm -rf ~/kept"])


def test_a_started_command_is_unknown_after_a_requeue_which_is_told_first(cluster: Cluster, client: Client) -> None:
    client.do("started = w.start_command('touch /workspace/begun; sleep 600'); tell(started=started)")
    client.hear("started")
    has_begun(client)
    requeue(client)
    client.do("tell(first=error_of(lambda: w.get_command_output(started, wait=True)))")
    assert client.hear("first")["kind"] == "SandboxRestarted"
    client.do("tell(second=error_of(lambda: w.get_command_output(started)))")
    assert client.hear("second")["kind"] == "UnknownCommandError"
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


@pytest.mark.parametrize("options", [f"image={TINY!r}", f"sif_file={SERVER!r}"])
def test_a_started_command_outlives_a_client_that_is_killed(cluster: Cluster, options: str) -> None:
    code = f"""
w = ApptainerWorkspace({options}, slurm=SlurmOptions(partition="cpu", time="10", mem="2G"))
w.start()
tell(id=w.id, started=w.start_command("echo on; until [ -e go ]; do sleep 0.1; done; echo off; exit 6"))
w.detach()
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    argv = cluster.argv("login", [f"{VENV}/python", "-c", PRELUDE + code])
    said = subprocess.run(argv, capture_output=True, text=True, timeout=180, check=False)
    told = json.loads(next(line for line in said.stdout.splitlines() if line.startswith(TOLD)).removeprefix(TOLD))
    again = f"""
with Workspace.attach({told["id"]!r}) as w:
    before = w.get_command_output({told["started"]!r})
    w.write_file("go", b"")
    after = w.get_command_output({told["started"]!r}, wait=True, since=before)
    tell(before=[before.stdout, before.exit_code], after=[after.stdout, after.exit_code])
"""
    found = cluster.tell("login", again)
    assert (found["before"], found["after"]) == (["on\n", None], ["off\n", 6])
    assert cluster.leftovers() == {}
