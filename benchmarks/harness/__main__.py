"""Measure the rows of this node. `python -m benchmarks.harness NODE [PATTERN...]`.

Prints a JSON object a line: each row as soon as it is measured, so that a node that dies takes no more with it than the
row that it was at; the machine before and after all. Progress goes to stderr. `on_cluster` runs it in the nodes of the
test cluster.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from benchmarks.harness.places import Places
from benchmarks.harness.report import Machine, RowReport, is_lost, row_report
from benchmarks.harness.rounds import measure_row, profile_row
from benchmarks.harness.rows import choose
from hpc_workspace import processes
from hpc_workspace.errors import PrerequisiteError
from hpc_workspace.version import __version__

_PROGRAMS = {"Apptainer": ["apptainer", "--version"], "Slurm": ["sbatch", "--version"], "OpenSSH": ["ssh", "-V"]}


def measure(node: str, patterns: list[str], rounds: int | None) -> Iterator[RowReport | Machine]:
    """All rows of this node that were asked for, in order; those that are lost are profiled at once."""
    with Places() as places:
        yield _machine(places)
        for row in choose(patterns, "login" if node == "login" else "n01"):
            row_began_s = time.monotonic()
            measured = measure_row(row, places, rounds)
            if is_lost(measured):
                measured.profile = profile_row(row, places)
            report = row_report(measured)
            _tell(report, time.monotonic() - row_began_s)
            yield report
        yield _machine(places)


def _tell(report: RowReport, took_s: float) -> None:
    figures = [
        f"{contestant.name} {contestant.figures.median:.3g}" for contestant in report.contestants if contestant.figures
    ]
    verdicts = [f"{goal.text}: {goal.verdict}" for goal in report.goals]
    sys.stderr.write(
        f"{report.name} ({took_s:.0f} s): {', '.join(figures)} {report.unit}; {'; '.join(verdicts) or 'no goal'}\n"
    )


def _machine(places: Places) -> Machine:
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    versions = {"hpc-workspace": __version__, "Python": platform.python_version(), "httpx": metadata.version("httpx")}
    versions["paramiko"] = metadata.version("paramiko")
    for name, argv in _PROGRAMS.items():
        try:
            ended = processes.run(argv, timeout_s=30)
        except PrerequisiteError:
            continue
        found = re.search(r"\d[\w.:-]*", ended.stdout + ended.stderr)
        versions[name] = found[0] if found else "unknown"
    if places.upstream_version is not None:
        versions["openhands-sdk"] = places.upstream_version
    return Machine(
        cpus=os.cpu_count() or 1,
        cpu_model=cpu[1] if cpu else platform.machine(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        kernel=platform.release(),
        versions=versions,
    )


def main() -> None:
    """The command line of one node's run."""
    parser = argparse.ArgumentParser(prog="benchmarks.harness", description=__doc__.partition("\n")[0])
    parser.add_argument("node", choices=["n01", "login"])
    parser.add_argument("patterns", nargs="*", help="shell patterns of the names of rows; none: all")
    parser.add_argument("--rounds", type=int, help="instead of each row's own number of rounds")
    given = parser.parse_args()
    for told in measure(given.node, given.patterns, given.rounds):
        print(told.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
