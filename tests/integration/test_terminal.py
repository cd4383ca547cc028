"""Interactive sessions on the cluster, as an ordinary user: each server, on the node itself and by each route."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.terminals import CLAIMS
from tests.integration.cluster import SERVER, TINY, VENV, Cluster

pytestmark = pytest.mark.cluster

SLURM = {"partition": "cpu", "time": "00:10:00", "mem": "2G"}
# The command line finds its own way: what it does by one route need not be looked at by each.
OF_SESSIONS = [name for name in CLAIMS if name.startswith("it")]
# One of each kind: a terminal, its keys, stdin, a loss.
FEW = [
    "it_passes_stdin_on_byte_for_byte_and_its_end",
    "its_environment_is_that_of_commands",
    "it_leaves_nothing_running_when_it_is_closed",
    "the_shell_is_on_a_terminal_like_ours",
    "ctrl_c_and_ctrl_z_are_the_program_s",
    "exec_passes_stdin_on_and_keeps_the_outputs_apart",
    "a_lost_session_is_told_in_a_line",
]


@dataclass(frozen=True)
class Way:
    """One way to have a workspace, and the claims that are looked at there."""

    node: str
    options: dict[str, object]
    names: list[str]


WAYS = {
    "bundled-here": Way("n01", {"image": TINY}, list(CLAIMS)),
    "bundled-slurm-paramiko": Way("login", {"image": TINY, "slurm": SLURM, "connect": "paramiko"}, list(CLAIMS)),
    "bundled-slurm-openssh": Way("login", {"image": TINY, "slurm": SLURM, "connect": "openssh"}, OF_SESSIONS),
    "bundled-slurm-srun": Way("login", {"image": TINY, "slurm": SLURM, "connect": "srun"}, OF_SESSIONS),
    "bundled-slurm-ssh-command": Way("login", {"image": TINY, "slurm": SLURM, "connect": "ssh-command"}, OF_SESSIONS),
    "openhands-slurm": Way("login", {"sif_file": SERVER, "slurm": SLURM}, FEW),
}
CASES = [(way, name) for way in WAYS for name in WAYS[way].names]


@pytest.fixture(scope="module")
def told(cluster: Cluster) -> dict[str, dict[str, str | None]]:
    """What went wrong by each way with each claim; None where nothing did. Filled as it is asked for."""
    return {}


def look(cluster: Cluster, way: Way) -> dict[str, str | None]:
    code = Path(__file__).parents[1].joinpath("contract/terminals.py").read_text()
    argv = [f"{VENV}/python", "-c", code, json.dumps(way.options), json.dumps(way.names)]
    ended = cluster.run(way.node, argv, timeout_s=300)
    assert ended.returncode == 0, ended.stderr
    return {line["name"]: line["wrong"] for line in map(json.loads, ended.stdout.splitlines())}


@pytest.mark.parametrize(("way", "name"), CASES)
def test_cluster(cluster: Cluster, told: dict[str, dict[str, str | None]], way: str, name: str) -> None:
    if way not in told:
        told[way] = look(cluster, WAYS[way])
    assert told[way][name] is None, told[way][name]


def test_nothing_is_left_after_any_of_them(cluster: Cluster) -> None:
    assert cluster.leftovers() == {}
