"""What many workspaces in many jobs cost the one process that holds them. `python benchmarks/scale.py [N] [PARTITION]`.

Run on a login node. The workspaces are the bundled server as a plain process, so that memory allows many on few nodes.
Prints a row for each stage: the client's threads, memory, open files and connections, and what it did meanwhile: file
operations and questions to Slurm, by Python's audit events, and CPU seconds.
"""

from __future__ import annotations

import concurrent.futures
import os
import resource
import statistics
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from hpc_workspace import ApptainerWorkspace, SlurmOptions, clock

_REST_S = 120.0
_AT_ONCE = 8
_SLURM = ("sbatch", "squeue", "sacct", "scancel", "scontrol")
# Audit events of the standard library (docs.python.org, audit events table); stat() has none.
_FILE_EVENTS = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime")
_counts: Counter[str] = Counter()


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _FILE_EVENTS:
        _counts["file operations"] += 1
    elif event == "subprocess.Popen" and Path(str(arguments[0])).name in _SLURM:
        _counts[Path(str(arguments[0])).name] += 1


def stage(name: str, began_s: float, before: Counter[str], cpu_before_s: float) -> tuple[Counter[str], float]:
    """Print what it took since `before`. Returns what `before` is for the next one."""
    since = _counts - before
    asked = ", ".join(f"{since[command]} {command}" for command in _SLURM if since[command]) or "none"
    memory_mb = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    descriptors = len(os.listdir("/proc/self/fd"))
    cpu_s = sum(os.times()[:2])
    print(
        f"| {name} | {clock.now_s() - began_s:.1f} | {threading.active_count()} | {memory_mb:.0f} | {descriptors} | "
        f"{since['file operations']} | {asked} | {cpu_s - cpu_before_s:.1f} |",
        flush=True,
    )
    return Counter(_counts), cpu_s


def main(count: int, partition: str) -> None:
    slurm = SlurmOptions(partition=partition, time="30", cpus_per_task=1, mem="150M")
    workspaces = [ApptainerWorkspace(runtime="process", slurm=slurm, idle_timeout="30min") for _ in range(count)]
    sys.addaudithook(_count)
    print(f"{count} workspaces in {count} jobs, {os.cpu_count()} CPUs")
    print("| stage | seconds | threads | memory, MB | open files | file operations | questions to Slurm | CPU, s |")
    print("|---|---|---|---|---|---|---|---|")
    mark = stage("nothing yet", clock.now_s(), Counter(_counts), sum(os.times()[:2]))
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            began_s = clock.now_s()
            list(pool.map(lambda workspace: workspace.start(), workspaces))
            mark = stage(f"all started, {_AT_ONCE} at once", began_s, *mark)
            began_s = clock.now_s()
            clock.sleep(_REST_S)
            mark = stage("at rest", began_s, *mark)
            began_s = clock.now_s()
            took_s = list(pool.map(_run, workspaces))
            mark = stage("one command in each", began_s, *mark)
            print(f"a command, median: {statistics.median(took_s) * 1000:.1f} ms", file=sys.stderr)
        finally:
            began_s = clock.now_s()
            list(pool.map(lambda workspace: workspace.close(), workspaces))
            stage("all closed", began_s, *mark)


def _run(workspace: ApptainerWorkspace) -> float:
    began_s = clock.now_s()
    assert workspace.execute_command("true").exit_code == 0
    return clock.now_s() - began_s


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2] if len(sys.argv) > 2 else "cpu")
