"""File systems whose locks fail or lie, where files appear late, and nodes whose clocks differ: `tests/layers/layer.c`."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster

pytestmark = pytest.mark.cluster

SOURCE = Path(__file__).parents[1] / "layers/layer.c"
LAYER = "/home/tester/layer.so"
LATE = {"LAYER_LATE_S": "600", "LAYER_BELOW": "/home/tester/"}


@pytest.fixture(scope="module")
def layer(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The layer, where every node sees it."""
    built = tmp_path_factory.mktemp("layer") / "layer.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", built, SOURCE], check=True)
    put = ["sh", "-c", f"base64 -d > {LAYER}"]
    cluster.run("login", put, stdin=base64.b64encode(built.read_bytes()).decode())
    yield LAYER
    cluster.run("login", ["rm", LAYER])


USE = """
import json
node = json.loads(os.environ["NODE_SIDE"])
setup = [f"export {name}={value}" for name, value in node.items()]
with ApptainerWorkspace(image=TINY, queue_timeout=60, slurm=SlurmOptions(partition="cpu", time="10", mem="1G", setup=setup)) as w:
    output = w.execute_command("echo through").stdout
    second = Workspace.attach(w.id)
    also = second.execute_command("echo attached").stdout
    second.disconnect()
    tell(output=output, also=also, left=w.time_left_s, id=w.id)
tell(listed=[record.workspace_id for record in Workspace.list()])
"""


@pytest.mark.parametrize(
    ("client", "node"),
    [
        ({"LAYER_FLOCK": "ENOSYS"}, {"LAYER_FLOCK": "ENOSYS"}),
        ({"LAYER_FLOCK": "ENOLCK"}, {"LAYER_FLOCK": "ENOLCK"}),
        ({"LAYER_FLOCK": "LIES"}, {"LAYER_FLOCK": "LIES"}),
        (LATE, LATE),
        ({}, {"LAYER_CLOCK_S": "600"}),
        ({}, {"LAYER_CLOCK_S": "-600"}),
        ({"LAYER_CLOCK_S": "600", **LATE, "LAYER_FLOCK": "ENOLCK"}, {}),
    ],
    ids=["no-locks", "no-lock-server", "locks-lie", "files-late", "node-ahead", "node-behind", "client-ahead-and-late"],
)
def test_a_workspace_works_where(cluster: Cluster, layer: str, client: dict[str, str], node: dict[str, str]) -> None:
    under = {"LD_PRELOAD": layer}
    env = {**(client | under if client else {}), "NODE_SIDE": json.dumps(node | under if node else {})}
    told = cluster.tell("login", USE, env=env, timeout_s=120)
    assert told["output"] == "through\n"
    assert told["also"] == "attached\n"
    assert 500 < told["left"] <= 600
    assert told["id"] not in told["listed"]
    assert cluster.leftovers() == {}
