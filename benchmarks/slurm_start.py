"""How far a workspace in a job is from its floor. `python benchmarks/slurm_start.py IMAGE.sif [N] [PARTITION]`.

Run on a login node. The floor is what Slurm takes from an accepted sbatch to the first line of the job's script, and
what the container takes from its spawn to its server's first answer. Both are measured in the very start that they are
the floor of, so that a scheduler whose mood changes is as slow for both. Prints medians, and the spread.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from pathlib import Path

from hpc_workspace import ApptainerWorkspace, SlurmOptions

_FLOOR = ("sbatch accepted to the job's first line (Slurm's own)", "the container, spawn to first answer")


def measure(partition: str, image: str, aside: Path) -> dict[str, float]:
    """One start, in seconds by what they are spent on."""
    begun, accepted = aside / "begun", aside / "accepted"
    begun.unlink(missing_ok=True)
    slurm = SlurmOptions(partition=partition, mem="2G", time="5", setup=[f": > {shlex.quote(str(begun))}"])
    workspace = ApptainerWorkspace(image=image, slurm=slurm)
    accepted.unlink(missing_ok=True)

    def note(_: str) -> None:
        # Told first when sbatch has answered. Both moments are by the clock of the file system's server.
        if not accepted.exists():
            accepted.touch()

    workspace.on_progress = note
    with workspace:
        phases_s = workspace.phases_s
        whole_s = phases_s["start"] - phases_s["image"] - phases_s["launch"]
        job_s = begun.stat().st_mtime - accepted.stat().st_mtime
        return {
            _FLOOR[0]: job_s,
            _FLOOR[1]: phases_s["node.server"],
            "sbatch accepted to a usable handle": whole_s,
            "beyond the floor": whole_s - job_s - phases_s["node.server"],
            "  of it: connection and proof": phases_s["connect"],
        }


def main(image: str, runs: int, partition: str) -> None:
    aside = Path("~/.hpc_workspace_benchmark").expanduser()
    aside.mkdir(mode=0o700, exist_ok=True)
    measure(partition, image, aside)  # caches, toolbox, bytecode
    rounds = [measure(partition, image, aside) for _ in range(runs)]
    print(f"{Path(image).name}, {runs} runs, {os.cpu_count()} CPUs; milliseconds")
    print(f"{'':56}{'median':>8}{'min':>8}{'max':>8}")
    for name in rounds[0]:
        values = [seconds[name] for seconds in rounds]
        shown = (statistics.median(values), min(values), max(values))
        print(f"{name:56}" + "".join(f"{seconds * 1000:8.0f}" for seconds in shown))


if __name__ == "__main__":
    main(
        str(Path(sys.argv[1]).absolute()),
        int(sys.argv[2]) if len(sys.argv) > 2 else 10,
        sys.argv[3] if len(sys.argv) > 3 else "cpu",
    )
