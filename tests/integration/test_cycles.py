"""Start and close, again and again: nothing grows, and nothing gets slower."""

from __future__ import annotations

import statistics

import pytest

from tests.integration.cluster import Cluster

pytestmark = pytest.mark.cluster

NODE = "n01"
CYCLES = """
def count():
    own = os.getuid()
    processes = [p for p in Path("/proc").iterdir() if p.name.isdigit() and p.exists() and p.stat().st_uid == own]
    return {{
        "processes": len(processes),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "mount namespaces": len({{os.readlink(p / "ns/mnt") for p in processes}}),
        "in /tmp": len(os.listdir("/tmp")),
        "in /dev/shm": len(os.listdir("/dev/shm")),
        "workspaces": len(os.listdir(Path.home() / ".hpc_workspace/workspaces")),
        "own descriptors": len(os.listdir("/proc/self/fd")),
        "own threads": len(os.listdir("/proc/self/task")),
    }}
def cycle():
    began = time.monotonic()
    with ApptainerWorkspace({options}) as w:
        took = time.monotonic() - began
        assert w.execute_command("echo x").stdout == "x\\n"
    return took
cycle()  # what is made once is made here
before = count()
times = [cycle() for _ in range({cycles})]
tell(before=before, after=count(), times=times)
"""


def run_cycles(cluster: Cluster, options: str, cycles: int) -> list[float]:
    """Start times in seconds, after the claim that nothing is more than before."""
    told = cluster.tell(NODE, CYCLES.format(options=options, cycles=cycles), timeout_s=60 + 60 * cycles)
    assert told["after"] == told["before"]
    assert cluster.leftovers([NODE]) == {}
    return list(told["times"])


def drift(times: list[float]) -> float:
    """The median start of the last tenth, as a multiple of the first tenth's."""
    tenth = max(1, len(times) // 10)
    return statistics.median(times[-tenth:]) / statistics.median(times[:tenth])


def require_no_drift(cluster: Cluster, options: str, cycles: int) -> None:
    """A machine's noise passes and a leak's drift stays: it is shown by three runs in a row, each from a new client."""
    seen = []
    for _ in range(3):
        seen.append(drift(run_cycles(cluster, options, cycles)))
        if seen[-1] <= 1.1:
            return
    raise AssertionError(f"starts get slower: last tenth / first tenth = {seen}")


def test_40_cycles_leave_nothing_and_get_no_slower(cluster: Cluster) -> None:
    require_no_drift(cluster, "image=TINY", 40)


def test_3_cycles_of_openhands_server_leave_nothing(cluster: Cluster) -> None:
    run_cycles(cluster, "sif_file=SERVER", 3)


@pytest.mark.long
def test_10_cycles_of_openhands_server_leave_nothing(cluster: Cluster) -> None:
    run_cycles(cluster, "sif_file=SERVER", 10)


@pytest.mark.long
def test_300_cycles_leave_nothing_and_get_no_slower(cluster: Cluster) -> None:
    require_no_drift(cluster, "image=TINY", 300)
