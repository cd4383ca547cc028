"""A batch through a real job array, as an ordinary user."""

from __future__ import annotations

import json

import pytest

from tests.integration.cluster import COMPUTE, VENV, Cluster

pytestmark = pytest.mark.cluster

EVALUATE = """
import json, shutil, socket
from pathlib import Path
from hpc_workspace import SlurmOptions
from hpc_workspace.batch import evaluate
from hpc_workspace.errors import JobEndedError

def agent(workspace, task):
    if task.get("dies"):
        import os, signal
        if not Path(task["dies"]).exists():
            Path(task["dies"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return {"node": workspace.node, "said": workspace.execute_command(f"echo {task['n']}").stdout.strip()}

run = Path.home() / "run"
shutil.rmtree(run, ignore_errors=True)
died = Path.home() / "died"
died.unlink(missing_ok=True)
tasks = [{"id": f"t{n}", "n": n} for n in range(6)] + [{"id": "killed", "n": 9, "dies": str(died)}]
options = dict(run_dir=run, image="/shared/images/tiny.sif", pilots=2, workspaces_per_pilot=2,
               slurm=SlurmOptions(partition="cpu", time="5", mem="2G", cpus_per_task=2))
lost = ""
try:
    evaluate(agent, tasks, **options)
except JobEndedError as error:
    lost = str(error)
report = evaluate(agent, tasks, **options)
print(json.dumps({"lost": lost, "counts": report.counts, "missing": report.missing, "results": report.results}))
"""


def test_a_killed_pilots_tasks_run_again_and_every_task_is_there_once(cluster: Cluster) -> None:
    ended = cluster.python("login", EVALUATE)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert "A pilot ended without a result" in told["lost"]
    assert told["missing"] == []
    assert told["counts"] == {"done": 7}
    said = {line["task"]: line["result"]["said"] for line in told["results"]}
    assert said == {**{f"t{n}": str(n) for n in range(6)}, "killed": "9"}
    assert all(line["result"]["node"].startswith("n0") for line in told["results"])
    # What a killed node program could not remove goes with the next workspace of this user on its node.
    for node in COMPUTE:
        again = cluster.run(node, [f"{VENV}/hpc-workspace", "run", "--image", "/shared/images/tiny.sif", "--", "true"])
        assert again.returncode == 0, again.stderr
    assert cluster.leftovers() == {}
