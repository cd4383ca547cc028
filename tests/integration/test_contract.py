"""The contract on the cluster, as an ordinary user: each server, on the node itself and through a job and SSH."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.contract.behaviours import BEHAVIOURS
from tests.integration.cluster import SERVER, TINY, VENV, Cluster

pytestmark = pytest.mark.cluster

SLURM = {"partition": "cpu", "time": "00:10:00", "mem": "2G"}


@dataclass(frozen=True)
class Way:
    """One way to have a workspace, and the claims that are known not to hold there, with the reason."""

    node: str
    options: dict[str, object]
    differences: dict[str, str] = field(default_factory=dict)


# OpenHands' agent server 1.58, as this suite shows it: what the client adds makes up for all that it lacks.
OPENHANDS: dict[str, str] = {}
WAYS = {
    "bundled-here": Way("n01", {"image": TINY}),
    "bundled-slurm-paramiko": Way("login", {"image": TINY, "slurm": SLURM, "connect": "paramiko"}),
    "bundled-slurm-openssh": Way("login", {"image": TINY, "slurm": SLURM, "connect": "openssh"}),
    "bundled-slurm-srun": Way("login", {"image": TINY, "slurm": SLURM, "connect": "srun"}),
    "bundled-slurm-ssh-command": Way("login", {"image": TINY, "slurm": SLURM, "connect": "ssh-command"}),
    "openhands-here": Way("n02", {"sif_file": SERVER}, OPENHANDS),
    "openhands-slurm": Way("login", {"sif_file": SERVER, "slurm": SLURM}, OPENHANDS),
}


@pytest.fixture(scope="module", params=WAYS)
def told(cluster: Cluster, request: pytest.FixtureRequest) -> tuple[Way, dict[str, str | None]]:
    """What went wrong with each claim, by this way; None where nothing did."""
    way = WAYS[request.param]
    code = Path(__file__).parents[1].joinpath("contract/behaviours.py").read_text()
    ended = cluster.run(way.node, [f"{VENV}/python", "-c", code, json.dumps(way.options)])
    assert ended.returncode == 0, ended.stderr
    lines = (json.loads(line) for line in ended.stdout.splitlines())
    return way, {line["name"]: line["wrong"] for line in lines}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_cluster(told: tuple[Way, dict[str, str | None]], name: str) -> None:
    way, wrong = told
    assert name in wrong
    if name in way.differences:
        assert wrong[name] is not None, f"no difference any more: {way.differences[name]}"
    else:
        assert wrong[name] is None, wrong[name]


def test_nothing_is_left_after_any_of_them(cluster: Cluster) -> None:
    assert cluster.leftovers() == {}
