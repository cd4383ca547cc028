"""The README's blocks and the examples, run on the cluster with the image that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.cluster import COMPUTE, Cluster

REPO = Path(__file__).parents[2]
TINY = "/shared/images/tiny.sif"
BLOCKS = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)


def test_the_readme_has_both_blocks() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.cluster
@pytest.mark.parametrize(("node", "block"), [("n01", 0), ("login", 1)])
def test_a_block_of_the_readme_prints_what_it_says(cluster: Cluster, node: str, block: int) -> None:
    code, expected = BLOCKS[block]
    ended = cluster.python(node, code.replace('"python.sif"', f'"{TINY}"'))
    assert ended.stdout == expected, ended.stderr


@pytest.mark.cluster
def test_the_local_example_runs(cluster: Cluster) -> None:
    code = (REPO / "examples/01_local.py").read_text().replace("sys.argv[1]", repr(TINY))
    assert cluster.python("n01", code).stdout.startswith("Python 3")


@pytest.mark.cluster
def test_the_slurm_example_runs(cluster: Cluster) -> None:
    code = (REPO / "examples/02_slurm.py").read_text()
    code = code.replace("sys.argv[1]", repr(TINY)).replace("sys.argv[2]", "'cpu'")
    node, hostname = cluster.python("login", code).stdout.split()
    assert node == hostname
    assert node in COMPUTE


def test_the_readme_names_only_commands_that_there_are() -> None:
    from hpc_workspace.cli.commands import cli

    listed = re.search(r"`hpc-workspace (demo [^`]+)`", (REPO / "README.md").read_text())
    assert listed is not None
    assert sorted(listed[1].split(" | ")) == sorted(cli.commands)
