"""How far a workspace in a job is from its floor. `python benchmarks/slurm_start.py IMAGE.sif [N] [PARTITION]`.

Run on a login node, from a directory that the nodes see. The floor is what Slurm itself takes from an accepted sbatch
to the first line of a job's script, and what the container with its server alone takes on a node (`start.py`). The
three take turns. Prints medians, and the spread.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from pathlib import Path

from hpc_workspace import ApptainerWorkspace, SlurmOptions, clock, processes

_HERE = Path(__file__).absolute().parent


def slurm_start_s(partition: str, aside: Path) -> float:
    """Seconds from sbatch's answer to the job's first line; both by the clock of the file system's server."""
    written = aside / "begun"
    sbatch(partition, f": > {shlex.quote(str(written))}", aside)
    accepted = aside / "accepted"
    accepted.touch()
    _wait_for(written)
    took_s = written.stat().st_mtime - accepted.stat().st_mtime
    written.unlink()
    return took_s


def container_start_s(partition: str, image: str, aside: Path) -> float:
    """Seconds from the container's spawn to its server's first answer, in a job."""
    code = f"import start; print(start.bare_start_s({image!r}), flush=True)"
    written, whole = aside / "took.part", aside / "took"
    run = f"cd {shlex.quote(str(_HERE))} && {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    names = f"{shlex.quote(str(written))} && mv {shlex.quote(str(written))} {shlex.quote(str(whole))}"
    sbatch(partition, f"{run} > {names}", aside)
    _wait_for(whole)
    took_s = float(whole.read_text())
    whole.unlink()
    return took_s


def sbatch(partition: str, line: str, aside: Path) -> None:
    argv = ["sbatch", "--parsable", f"--partition={partition}", "--mem=2G", "--time=5", f"--output={aside}/log"]
    ended = processes.run([*argv, f"--wrap={line}"], timeout_s=60, env=dict(os.environ))
    assert ended.returncode == 0, ended.said


def _wait_for(path: Path) -> None:
    for pause_s in clock.pauses_s(0.005, 0.02):
        if path.name in os.listdir(path.parent):
            return
        clock.sleep(pause_s)


def whole_start_s(partition: str, image: str) -> float:
    """Seconds from sbatch's answer to a handle that can be used."""
    with ApptainerWorkspace(image=image, slurm=SlurmOptions(partition=partition, mem="2G", time="5")) as workspace:
        phases_s = workspace.phases_s
        return phases_s["start"] - phases_s["image"] - phases_s["launch"]


def main(image: str, runs: int, partition: str) -> None:
    aside = Path("~/.hpc_workspace_benchmark").expanduser()
    aside.mkdir(mode=0o700, exist_ok=True)
    whole_start_s(partition, image)  # caches, toolbox, bytecode
    rows: dict[str, list[float]] = {}
    for _ in range(runs):
        job = slurm_start_s(partition, aside)
        container = container_start_s(partition, image, aside)
        whole = whole_start_s(partition, image)
        for name, value in {
            "sbatch accepted to the job's first line (Slurm's own)": job,
            "the container with its server alone, in a job": container,
            "sbatch accepted to a usable handle": whole,
            "the same, less the two of its round": whole - job - container,
        }.items():
            rows.setdefault(name, []).append(value)
    print(f"{Path(image).name}, {runs} runs, {os.cpu_count()} CPUs; milliseconds")
    print(f"{'':56}{'median':>8}{'min':>8}{'max':>8}")
    for name, values in rows.items():
        shown = (statistics.median(values), min(values), max(values))
        print(f"{name:56}" + "".join(f"{seconds * 1000:8.0f}" for seconds in shown))


if __name__ == "__main__":
    main(
        str(Path(sys.argv[1]).absolute()),
        int(sys.argv[2]) if len(sys.argv) > 2 else 10,
        sys.argv[3] if len(sys.argv) > 3 else "cpu",
    )
