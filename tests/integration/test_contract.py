"""The contract on the cluster, as an ordinary user: each server, on the node itself and through a job and SSH."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract.behaviours import BEHAVIOURS
from tests.integration.cluster import VENV, Cluster

pytestmark = pytest.mark.cluster

TINY, SERVER = "/shared/images/tiny.sif", "/shared/images/agent-server.sif"
SLURM = {"partition": "cpu", "time": "00:10:00", "mem": "2G"}
WAYS = {
    "bundled-here": ("n01", {"image": TINY}),
    "bundled-slurm-paramiko": ("login", {"image": TINY, "slurm": SLURM, "connect": "paramiko"}),
    "bundled-slurm-openssh": ("login", {"image": TINY, "slurm": SLURM, "connect": "openssh"}),
    "openhands-slurm": ("login", {"sif_file": SERVER, "slurm": SLURM}),
}


@pytest.fixture(scope="module", params=WAYS)
def told(cluster: Cluster, request: pytest.FixtureRequest) -> dict[str, str | None]:
    """What went wrong with each claim, by this way; None where nothing did."""
    node, options = WAYS[request.param]
    code = Path(__file__).parents[1].joinpath("contract/behaviours.py").read_text()
    ended = cluster.run(node, [f"{VENV}/python", "-c", code, json.dumps(options)])
    assert ended.returncode == 0, ended.stderr
    lines = (json.loads(line) for line in ended.stdout.splitlines())
    return {line["name"]: line["wrong"] for line in lines}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_cluster(told: dict[str, str | None], name: str) -> None:
    assert name in told
    assert told[name] is None, told[name]


def test_nothing_is_left_after_any_of_them(cluster: Cluster) -> None:
    assert cluster.leftovers() == {}
