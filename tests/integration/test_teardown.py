"""However a workspace ends, nothing of it is left: no process, no FUSE helper, no mount, no scratch, no job.

Each workspace has what is hard to remove: files of a subordinate id in a closed directory, and a process that fled its
command's session.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.integration.cluster import COMPUTE, PRELUDE, TOLD, VENV, Cluster

pytestmark = pytest.mark.cluster

LITTER = "mkdir /x && touch /x/f && chown -R 33:33 /x && chmod 700 /x; (setsid sleep 9999 >/dev/null 2>&1 &)"
HOLD = """
w = ApptainerWorkspace({options}).start()
w.execute_command({litter!r})
tell(id=w.id, node=w.node, pid=os.getpid(), job=w.job)
sys.stdin.readline()
{then}
"""
LOCAL = "image=TINY"
ON_SLURM = "image=TINY, slurm=SLURM"
WHERE = {"here": ("n01", LOCAL), "slurm": ("login", ON_SLURM)}


class Held:
    """A workspace with litter, held open by a client in another process."""

    def __init__(self, cluster: Cluster, where: str, then: str = "w.close()") -> None:
        node, options = WHERE[where]
        code = PRELUDE + HOLD.format(options=options, litter=LITTER, then=then)
        self.cluster = cluster
        self.client_node = node
        self.client = cluster.open(node, [f"{VENV}/python", "-c", code])
        assert self.client.stdout
        self.told = json.loads(self.client.stdout.readline().removeprefix(TOLD))
        self.node = self.told["node"]
        session = cluster.session(self.node, self.told["id"])
        self.warden, self.program = sorted(pid for pid, name in session.items() if name == "node program")
        self.server = min(pid for pid, name in session.items() if name == "ld.so")
        assert "sleep" in session.values()
        assert "fuse-overlayfs" in cluster.run(self.node, ["ps", "-u", "tester", "-o", "comm="], user="root").stdout

    def go_on(self, timeout_s: float = 60) -> str:
        """Let the client go on to its end. Returns its stderr."""
        _, said = self.client.communicate("\n", timeout=timeout_s)
        return said

    def require_nothing_left(self) -> None:
        assert self.cluster.leftovers([self.node]) == {}
        assert self.cluster.session(self.node, self.told["id"]) == {}


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_nothing_is_left_after_close(cluster: Cluster, where: str) -> None:
    held = Held(cluster, where)
    assert held.go_on() == ""
    held.require_nothing_left()


def test_nothing_is_left_after_the_interpreter_ends_without_close(cluster: Cluster, where: str) -> None:
    held = Held(cluster, where, then="")
    assert held.go_on() == ""
    held.require_nothing_left()


@pytest.mark.parametrize("number", [15, 9])
def test_a_local_workspace_ends_with_its_client(cluster: Cluster, number: int) -> None:
    held = Held(cluster, "here")
    cluster.kill(held.client_node, held.told["pid"], number=number)
    held.client.wait(30)
    held.require_nothing_left()


def test_a_client_killed_before_it_had_a_lease_leaves_nothing(cluster: Cluster) -> None:
    """OpenHands' server takes its time to start: there is enough of it to die in."""
    code = "tell(pid=os.getpid())\nApptainerWorkspace(sif_file=SERVER).start()"
    client = cluster.open("n01", [f"{VENV}/python", "-c", PRELUDE + code])
    assert client.stdout
    told = json.loads(client.stdout.readline().removeprefix(TOLD))
    cluster.run("n01", ["sh", "-c", "until pgrep -u tester -f agent_server >/dev/null; do :; done"], user="root")
    cluster.kill("n01", told["pid"])
    client.wait(30)
    assert cluster.leftovers(["n01"]) == {}


def test_nothing_is_left_after_the_server_was_killed(cluster: Cluster, where: str) -> None:
    held = Held(cluster, where, then="print(error_of(lambda: w.execute_command('true')), file=sys.stderr); w.close()")
    cluster.kill(held.node, held.server)
    said = held.go_on()
    assert "'kind': 'ContainerError', 'text': 'The agent server on n0" in said
    assert "ended with signal 9" in said
    held.require_nothing_left()


def test_nothing_is_left_after_the_node_program_was_killed(cluster: Cluster, where: str) -> None:
    held = Held(cluster, where)
    cluster.kill(held.node, held.program)
    assert "was killed by SIGKILL" in held.go_on()
    held.require_nothing_left()


def test_nothing_is_left_after_the_warden_was_killed(cluster: Cluster) -> None:
    """On Slurm the warden is the job's process: its death is the job's, see below."""
    held = Held(cluster, "here")
    cluster.kill(held.node, held.warden)
    held.go_on()
    held.require_nothing_left()


def test_nothing_is_left_after_both_were_killed_and_the_client_closed(cluster: Cluster) -> None:
    held = Held(cluster, "here")
    cluster.kill(held.node, held.warden, held.program)
    held.go_on()
    held.require_nothing_left()


def test_reap_removes_what_is_left_after_everybody_was_killed(cluster: Cluster) -> None:
    held = Held(cluster, "here")
    cluster.kill(held.node, held.told["pid"], held.warden, held.program)
    held.client.wait(30)
    ended = cluster.run(held.node, [f"{VENV}/hpc-workspace", "reap", "--json"])
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["left"] == []
    assert [path for path in found["removed"] if path.startswith("/tmp/hpcws-")]
    assert [text for text in found["removed"] if held.told["id"] in text]
    held.require_nothing_left()
    assert cluster.run(held.node, [f"{VENV}/hpc-workspace", "reap"]).stdout == "nothing to reap\n"


def test_a_start_removes_what_a_dead_workspace_left(cluster: Cluster) -> None:
    held = Held(cluster, "here")
    cluster.kill(held.node, held.told["pid"], held.warden, held.program)
    held.client.wait(30)
    cluster.tell(held.node, "with ApptainerWorkspace(image=TINY): pass")
    held.require_nothing_left()


def test_reap_leaves_the_living_alone(cluster: Cluster) -> None:
    held = Held(cluster, "here")
    said = cluster.run(held.node, [f"{VENV}/hpc-workspace", "reap"]).stdout
    assert held.told["id"] not in said
    assert "/tmp/hpcws-" not in said
    assert held.server in cluster.session(held.node, held.told["id"])
    assert held.go_on() == ""


def test_what_can_not_be_removed_is_named_and_goes_once_it_can(cluster: Cluster) -> None:
    code = """
w = ApptainerWorkspace(image=TINY).start()
w.execute_command("touch /tmp/stone")
tell(scratch=w._record.node_scratch)
sys.stdin.readline()
tell(error=error_of(w.close))
"""
    client = cluster.open("n01", [f"{VENV}/python", "-c", PRELUDE + code])
    assert client.stdout
    stone = json.loads(client.stdout.readline().removeprefix(TOLD))["scratch"] + "/tmp/stone"
    assert cluster.run("n01", ["chattr", "+i", stone], user="root").returncode == 0
    try:
        out, _ = client.communicate("\n", timeout=60)
    finally:
        cluster.run("n01", ["chattr", "-i", stone], user="root")
    error = json.loads(out.removeprefix(TOLD))["error"]
    assert error["kind"] == "ContainerError"
    assert "left something behind" in error["text"]
    assert f"{stone} (of user id 2001)" in error["text"]
    assert "hpc-workspace reap" in error["text"]
    assert cluster.run("n01", [f"{VENV}/hpc-workspace", "reap"]).returncode == 0
    assert cluster.leftovers(["n01"]) == {}


@pytest.fixture
def no_cgroups(cluster: Cluster) -> Iterator[None]:
    """Slurm without cgroups: it kills what it finds by parenthood, and nothing when a job ends by itself."""
    cluster.call("proctrack", "linuxproc")
    yield
    cluster.call("proctrack", "cgroup")


@pytest.mark.usefixtures("no_cgroups")
@pytest.mark.parametrize("how", ["close", "program", "server", "scancel"])
def test_nothing_is_left_by_slurm_without_cgroups(cluster: Cluster, how: str) -> None:
    held = Held(cluster, "slurm")
    if how == "scancel":
        cluster.run("login", ["scancel", held.told["job"]])
    elif how != "close":
        cluster.kill(held.node, held.program if how == "program" else held.server)
    held.go_on()
    held.require_nothing_left()


def test_nothing_is_left_after_scancel(cluster: Cluster) -> None:
    held = Held(cluster, "slurm")
    cluster.run("login", ["scancel", held.told["job"]])
    held.go_on()
    held.require_nothing_left()


def test_a_killed_jobs_scratch_goes_with_the_next_start_on_its_node(cluster: Cluster) -> None:
    held = Held(cluster, "slurm")
    cluster.kill(held.node, held.warden)
    held.go_on()
    for node in COMPUTE:
        cluster.tell(node, "with ApptainerWorkspace(image=TINY): pass")
    held.require_nothing_left()
