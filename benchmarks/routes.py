"""What each route to a node costs. `python benchmarks/routes.py [ROUNDS] [PARTITION]`.

Run on a login node. One workspace, the bundled server as a plain process in a job; a client of it by each route. The
routes take turns, so that a machine whose speed drifts is as slow for all. Prints medians over the rounds: the time to
the first answer, the median of a small request and of a command, and the speed of a large file each way.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace, clock

ROUTES = ("paramiko", "openssh", "srun", "ssh-command")
_REQUESTS = 300
_COMMANDS = 50
_FILE_MB = 64


def _took_s(act: Callable[[], object]) -> float:
    began_s = clock.now_s()
    act()
    return clock.now_s() - began_s


def _median_ms(act: Callable[[], object], times: int) -> float:
    act()
    return statistics.median(_took_s(act) for _ in range(times)) * 1000


def measure(workspace_id: str, route: str, source: Path) -> dict[str, float]:
    """One round of one route; all of it is made anew."""
    began_s = clock.now_s()
    workspace = Workspace.attach(workspace_id, connect=route)
    try:
        workspace.health()
        first_ms = (clock.now_s() - began_s) * 1000
        return {
            "attached and answered, ms": first_ms,
            "small request, ms": _median_ms(workspace.health, _REQUESTS),
            "command `true`, ms": _median_ms(lambda: workspace.execute_command("true"), _COMMANDS),
            "up, MB/s": _FILE_MB / _took_s(lambda: workspace.file_upload(source, "file")),
            "down, MB/s": _FILE_MB / _took_s(lambda: workspace.file_download("file", source.with_suffix(".back"))),
        }
    finally:
        workspace.disconnect()


def main(rounds: int, partition: str) -> None:
    slurm = SlurmOptions(partition=partition, time="30", cpus_per_task=1, mem="1G")
    with (
        tempfile.TemporaryDirectory() as directory,
        ApptainerWorkspace(runtime="process", slurm=slurm) as workspace,
    ):
        source = Path(directory, "file")
        source.write_bytes(os.urandom(_FILE_MB * 1_000_000))
        rows: dict[str, list[dict[str, float]]] = {route: [] for route in ROUTES}
        for _ in range(rounds):
            for route, figures in rows.items():
                figures.append(measure(workspace.id, route, source))
    names = list(rows[ROUTES[0]][0])
    print(f"{rounds} rounds, {os.cpu_count()} CPUs")
    print(f"| route | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for route, figures in rows.items():
        cells = [f"{statistics.median(figure[name] for figure in figures):.4g}" for name in names]
        print(f"| `{route}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2] if len(sys.argv) > 2 else "cpu")
