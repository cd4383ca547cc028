"""How far a workspace's start, its end and its death are from their floor. `python benchmarks/start.py IMAGE.sif [N]`.

The floor is the same container with the same server, started bare and asked every millisecond until it answers. Bare
and whole take turns, so that a machine whose speed drifts is as slow for both. Prints medians, and the spread.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from hpc_workspace import ApptainerWorkspace, clock, processes, procfs, teardown
from hpc_workspace.errors import WorkspaceError
from hpc_workspace.node import leftovers, server
from hpc_workspace.node.identity import Family, NotOursError
from hpc_workspace.node.plan import Ingredients, make_plan
from hpc_workspace.node.scratch import Scratch, choose_base
from hpc_workspace.options import WorkspaceOptions
from hpc_workspace.owner import Owner
from hpc_workspace.request import make_spec


def bare_start_s(image: str) -> float:
    """Seconds from the container's spawn to its server's first answer, with nothing of ours around it."""
    owner = Owner.of(os.getpid())
    spec = make_spec(WorkspaceOptions(image=image), slurm=None, say=print)
    scratch = Scratch(choose_base(os.environ), owner)
    tag = (leftovers.TAG_NAME, leftovers.tag_value(spec.workspace_id, spec.launch_id, owner))
    plan = make_plan(spec, Ingredients(scratch, "0" * 43, {}, {}, tag))
    family = Family()
    began_s = clock.now_s()
    with open(os.devnull, "wb") as output:
        child = processes.spawn(plan.argv, output=output, env=plan.environment, cwd=plan.cwd)
    while not _answers(plan.address, family):
        clock.sleep(0.001)
    took_s = clock.now_s() - began_s
    teardown.terminate(child.pid, grace_s=2)
    leftovers.clear(lambda found: found == owner, [scratch.path.parent], waited_for_pid=child.pid)
    child.wait(5)
    return took_s


def _answers(address: server.Address, family: Family) -> bool:
    try:
        server.ask(address, family, "/health")
    except (OSError, ValueError, NotOursError):
        return False
    return True


def whole_start_s(image: str) -> tuple[float, float]:
    """Seconds for `start()` and for `close()`."""
    workspace = ApptainerWorkspace(image=image)
    began_s = clock.now_s()
    workspace.start()
    started_s = clock.now_s()
    workspace.execute_command("true")
    closing_s = clock.now_s()
    workspace.close()
    return started_s - began_s, clock.now_s() - closing_s


def death_noticed_s(image: str) -> tuple[float, float]:
    """Seconds from the server's death until the node program's log says so, and until a client's command fails."""
    workspace = ApptainerWorkspace(image=image).start()
    warden = Owner.parse(workspace._require_record().owner)
    assert warden is not None
    family = procfs.descendants(warden.pid)
    victim = next(process for process in family if procfs.is_elsewhere(process.pid, "pid"))
    log = workspace._require_dir().node_log
    killed_s = clock.now_s()
    os.kill(victim.pid, signal.SIGKILL)
    noticed_s = _until(lambda: "failed: The agent server" in log.read_text()) - killed_s
    try:
        workspace.execute_command("true")
    except WorkspaceError:
        failed_s = clock.now_s() - killed_s
    workspace.close()
    return noticed_s, failed_s


def _until(is_so: Callable[[], bool]) -> float:
    while not is_so():
        clock.sleep(0.001)
    return clock.now_s()


def main(image: str, runs: int) -> None:
    teardown.become_subreaper()
    whole_start_s(image)  # caches, toolbox, bytecode
    rows: dict[str, list[float]] = {}
    for _ in range(runs):
        bare = bare_start_s(image)
        start, close = whole_start_s(image)
        noticed, failed = death_noticed_s(image)
        for name, value in {
            "server's own start": bare,
            "start()": start,
            "start() less the server's own": start - bare,
            "close()": close,
            "death noticed by the node program": noticed,
            "death told to the client, all cleared away": failed,
        }.items():
            rows.setdefault(name, []).append(value)
    print(f"{Path(image).name}, {runs} runs, {os.cpu_count()} CPUs; milliseconds")
    print(f"{'':44}{'median':>8}{'min':>8}{'max':>8}")
    for name, values in rows.items():
        print(f"{name:44}{_ms(statistics.median(values))}{_ms(min(values))}{_ms(max(values))}")
    ratio = statistics.median(rows["start()"]) / statistics.median(rows["server's own start"])
    print(f"start() / server's own start: {ratio:.2f}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:8.0f}"


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).absolute()), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
