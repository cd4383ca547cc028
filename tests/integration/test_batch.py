"""A batch through real job arrays, as an ordinary user."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO
from tests.integration.cluster import COMPUTE, VENV, Cluster

pytestmark = pytest.mark.cluster

BEGIN = """
import json, logging, os, shutil, signal, sys
from pathlib import Path
from hpc_workspace import SlurmOptions
from hpc_workspace.batch import evaluate
from hpc_workspace.errors import WorkspaceError
logging.basicConfig(level=logging.INFO)
run = Path.home() / "run"
died = Path.home() / "died"
"""
EVALUATE = (
    BEGIN
    + """
def agent(workspace, task):
    if task.get("kills") and not died.exists():
        died.touch()
        os.kill(os.getppid() if task["kills"] == "pilot" else os.getpid(), signal.SIGKILL)
    if task.get("fails"):
        raise ValueError("no idea")
    if task.get("exits"):
        os._exit(3)
    if task.get("hangs"):
        workspace.execute_command("sleep 600", timeout=700)
    print("said by the agent", task["id"])
    return {"node": workspace.node, "said": workspace.execute_command(f"echo {task['id']}").stdout.strip()}

shutil.rmtree(run, ignore_errors=True)
died.unlink(missing_ok=True)
report = evaluate(agent, TASKS, run_dir=run, image="/shared/images/tiny.sif", pilots=2, workspaces_per_pilot=2,
                  slurm=SlurmOptions(partition="cpu", time="10", mem="4G", cpus_per_task=2), OPTIONS)
print(json.dumps({"counts": report.counts, "missing": report.missing, "results": report.results,
                  "attempts": report.attempts, "modes": [oct(p.stat().st_mode & 0o777) for p in run.iterdir()],
                  "log": next(run.glob("attempts/t0/1/agent.log")).read_text()}))
"""
)


def evaluate(cluster: Cluster, tasks: list[dict[str, Any]], options: str = "") -> dict[str, Any]:
    code = EVALUATE.replace("TASKS", repr(tasks)).replace(", OPTIONS", f", {options}" if options else "")
    ended = cluster.python("login", code)
    assert ended.returncode == 0, ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    told["stderr"] = ended.stderr
    return told


class Client:
    """A process on the login node that runs a batch."""

    def __init__(self, cluster: Cluster, code: str) -> None:
        self._process = cluster.open("login", [f"{VENV}/python", "-c", code])
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "BEGUN\n"

    def kill(self) -> None:
        """At one blow, and not to be caught."""
        above = self._process.pid
        for pid in Path(f"/proc/{above}/task/{above}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        self._process.communicate()

    def finish(self) -> dict[str, Any]:
        """What it tells at its end."""
        said, errors = self._process.communicate()
        assert self._process.returncode == 0, errors
        told: dict[str, Any] = json.loads(said.splitlines()[-1].removeprefix("TOLD "))
        return told


def clear_up(cluster: Cluster) -> None:
    """What a killed node program could not remove goes with the next workspace of this user on its node."""
    for node in COMPUTE:
        again = cluster.run(node, [f"{VENV}/hpc-workspace", "run", "--image", "/shared/images/tiny.sif", "--", "true"])
        assert again.returncode == 0, again.stderr
    assert cluster.leftovers() == {}


def test_every_task_has_its_own_end_and_its_own_log(cluster: Cluster) -> None:
    tasks = [{"id": f"t{n}"} for n in range(4)]
    tasks += [{"id": "fails", "fails": 1}, {"id": "exits", "exits": 1}, {"id": "hangs", "hangs": 1}]
    told = evaluate(cluster, tasks, "task_timeout=20")
    assert told["missing"] == []
    assert told["counts"] == {"done": 4, "agent": 2, "task_timeout": 1}
    said = {line["task"]: line["result"]["said"] for line in told["results"] if line["status"] == "done"}
    assert said == {f"t{n}": f"t{n}" for n in range(4)}
    errors = {line["task"]: line["error"] for line in told["results"]}
    assert "ValueError: no idea" in errors["fails"]
    assert "exit code 3" in errors["exits"]
    assert "It had 20 s" in errors["hangs"]
    assert told["log"] == "said by the agent t0\n"
    assert {line["node"][:2] for line in told["results"]} == {"n0"}
    assert cluster.leftovers() == {}


@pytest.mark.parametrize("kills", ["attempt", "pilot"])
def test_what_was_killed_is_done_again_in_the_same_call(cluster: Cluster, kills: str) -> None:
    told = evaluate(cluster, [{"id": f"t{n}"} for n in range(5)] + [{"id": "killer", "kills": kills}])
    assert told["missing"] == []
    assert told["counts"] == {"done": 6}
    assert told["attempts"]["lost"] >= 1
    assert {line["task"]: line["attempt"] for line in told["results"]}["killer"] == 2
    clear_up(cluster)


def test_a_sandbox_that_can_not_start_is_seen_by_one_pilot_and_one_task(cluster: Cluster) -> None:
    code = EVALUATE.replace("TASKS", repr([{"id": f"t{n}"} for n in range(20)]))
    code = code.replace(", OPTIONS", ", extra_bind_mounts=['/nowhere:/x'], retries={'start': 0}")
    ended = cluster.python("login", code)
    assert ended.returncode != 0
    assert "The first task's sandbox did not start" in ended.stderr, ended.stderr
    begun = cluster.run("login", ["sh", "-c", "ls ~/run/claims ~/run/pilots | grep -c ."]).stdout.strip()
    assert int(begun) <= 6  # two headings, a blank line, one pilot and one task
    assert cluster.leftovers() == {}


CHAOS = """
import json, logging, sys
from pathlib import Path
from hpc_workspace import SlurmOptions
from hpc_workspace.batch import evaluate
logging.basicConfig(level=logging.INFO)

def agent(workspace, task):
    return workspace.execute_command(f"sleep 1; echo {task['id']}").stdout.strip()

print("BEGUN", flush=True)
report = evaluate(agent, [{"id": f"t{n}"} for n in range(TASKS)], run_dir=Path.home() / "run", task_timeout=120,
                  image="/shared/images/tiny.sif", pilots=3, workspaces_per_pilot=3, max_infra_loss=0,
                  slurm=SlurmOptions(partition="low", time="30", mem="3G", cpus_per_task=3))
print("TOLD " + json.dumps({"counts": report.counts, "missing": report.missing, "attempts": report.attempts,
                            "said": {line["task"]: line["result"] for line in report.results}}), flush=True)
"""
# Until so many attempts have ended, by what the pilots have written.
ENDED = 'while [ "$(cat ~/run/pilots/*/records.jsonl 2>/dev/null | wc -l)" -lt "$1" ]; do sleep 0.2; done'
# A node on which a pilot works, other than $1.
A_NODE = 'squeue -h --me -t R -o %N | grep -v -x "$1" | head -n 1'


def chaos(cluster: Cluster, tasks: int) -> None:
    """Pilots are preempted, a node dies and comes back, Slurm's controller and the client are started anew."""

    def wait_ended(share: float) -> None:
        cluster.run("login", ["sh", "-c", ENDED, "sh", str(int(tasks * share))])

    def begin() -> Client:
        return Client(cluster, CHAOS.replace("TASKS", str(tasks)))

    cluster.run("login", ["rm", "-rf", "run"])
    client = begin()
    wait_ended(0.15)
    preempted = cluster.run("login", ["sh", "-c", A_NODE, "sh", "none"]).stdout.strip()
    taken = cluster.run("login", ["srun", "-p", "high", "-w", preempted, "--exclusive", "sleep", "1"])
    assert taken.returncode == 0, taken.stderr
    wait_ended(0.3)
    client.kill()
    dead = cluster.run("login", ["sh", "-c", A_NODE, "sh", preempted]).stdout.strip()
    cluster.call("power-cut", dead)
    client = begin()
    wait_ended(0.5)
    cluster.call("daemon", "stop", "login", "slurmctld")
    wait_ended(0.6)
    cluster.call("daemon", "start", "login", "slurmctld")
    cluster.power_on(dead)
    told = client.finish()
    assert told["missing"] == []
    assert told["counts"] == {"done": tasks}
    assert told["said"] == {f"t{n}": f"t{n}" for n in range(tasks)}
    assert told["attempts"]["done"] == tasks
    assert sum(count for name, count in told["attempts"].items() if name in ("preempted", "node_fail", "lost")) > 0
    clear_up(cluster)


def test_a_run_under_fire_has_every_task_once(cluster: Cluster) -> None:
    chaos(cluster, 40)


@pytest.mark.long
def test_a_long_run_under_fire_has_every_task_once(cluster: Cluster) -> None:
    chaos(cluster, 200)


@pytest.mark.parametrize(("agent", "resolved"), [("golden", 12), ("wrong", 0)])
def test_the_benchmark_of_real_bugs(cluster: Cluster, agent: str, resolved: int) -> None:
    """The example, over two images of two Pythons; what the golden agent leaves is what it was given."""
    at = "/shared/scratch/bugs"
    put = cluster.call("status", "--json")
    shared = Path(json.loads(put.stdout)["shared"]) / "scratch/bugs"
    shutil.rmtree(shared, ignore_errors=True)
    shutil.copytree(REPO / "examples", shared)
    cluster.run("login", ["chmod", "-R", "a+rX", at], user="root")
    images = ["/shared/images/debian-old.sif", "/shared/images/agent-server.sif"]
    cluster.run("login", ["rm", "-rf", "run"])
    argv = [f"{VENV}/python", f"{at}/11_batch_of_bugs.py", "run", *images, "--agent", agent, "--slurm", "cpu"]
    ended = cluster.run("login", argv)
    assert ended.returncode == 0, ended.stderr
    assert f"{resolved} of 12 resolved; 0 lost to the infrastructure" in ended.stdout
    told = cluster.run("login", ["cat", "run/preds.jsonl"]).stdout
    found = {line["instance_id"]: line["model_patch"] for line in map(json.loads, told.splitlines())}
    for folder in (REPO / "examples/bugs").iterdir():
        given = (folder / f"{agent}.patch").read_text()
        assert changes(found[folder.name]) == changes(given), folder.name
    assert cluster.leftovers() == {}


def changes(patch: str) -> list[str]:
    """The lines that a patch takes and gives."""
    return [line for line in patch.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
