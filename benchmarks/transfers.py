"""What files cost to move. `python benchmarks/transfers.py [ROUNDS] [PARTITION] [MIB]`; run on a login node.

One workspace, the bundled server as a plain process in a job, whose `mount_dir` is a directory that both nodes have. A
client of it by each route, `scp` between the same nodes, and `cp` for the shared directory take turns, so that a
machine whose speed drifts is as slow for all. Prints medians, the spread, and each row's ratio to its peer in the same
round, whose median is what the goals are about: 0.9 of `scp` through SSH, 0.9 of `cp` through the shared directory.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace, clock

ROUTES = ("paramiko", "openssh", "srun", "ssh-command")
_MIB = 1024 * 1024
_SMALL_FILES = 10_000
_SMALL_BYTES = 1000


def _took_s(act: Callable[[], object]) -> float:
    began_s = clock.now_s()
    act()
    return clock.now_s() - began_s


def _run(*argv: str | Path) -> Callable[[], object]:
    # S603: fixed programs, paths of our own.
    return lambda: subprocess.run([str(word) for word in argv], check=True)


class Round:
    """One round: every row once. `seconds` has what each took, `bytes_moved` how much each moved."""

    def __init__(self, workspace: Workspace, here: Path, shared: Path) -> None:
        self.workspace, self.here, self.shared = workspace, here, shared
        self.seconds: dict[str, float] = {}

    def time(self, row: str, act: Callable[[], object]) -> None:
        """One row."""
        self.seconds[row] = _took_s(act)
        print(f"{row}: {self.seconds[row]:.2f} s", file=sys.stderr, flush=True)

    def over_ssh(self) -> None:
        """`scp` and each route, to and from a directory of the node's own."""
        node, far = self.workspace.node, f"/tmp/bench-{os.getpid()}"  # noqa: S108 - the node's
        self.workspace.execute_command(f"mkdir -p {far}")
        for size in ("large", "one"):
            self.time(f"{size} up, scp", _run("scp", "-q", self.here / size, f"{node}:{far}/{size}"))
            self.time(f"{size} down, scp", _run("scp", "-q", f"{node}:{far}/{size}", self.here / "back"))
        self.time("small up, scp", _run("scp", "-qr", self.here / "small", f"{node}:{far}/s"))
        self.time("small down, scp", _run("scp", "-qr", f"{node}:{far}/s", self.here / "s-back"))
        shutil.rmtree(self.here / "s-back")
        for route in ROUTES:
            client = Workspace.attach(self.workspace.id, connect=route)
            client.health()
            self._by(route, client, far)
            client.disconnect()
        self.workspace.execute_command(f"rm -rf {far}")

    def _by(self, route: str, client: Workspace, far: str) -> None:
        for size, back in (("large", "back"), ("one", "back"), ("small", "s-back")):
            source, there, target = self.here / size, f"{far}/{size}-{route}", self.here / back
            self.time(f"{size} up, {route}", lambda s=source, t=there: client.file_upload(s, t))
            self.time(f"{size} down, {route}", lambda s=there, t=target: client.file_download(s, t))
        shutil.rmtree(self.here / "s-back")

    def over_disk(self) -> None:
        """`cp` and the shared directory."""
        large = self.here / "large"
        self.time("large up, cp", _run("cp", large, self.shared / "by-cp"))
        self.time("large up, shared", lambda: self.workspace.file_upload(large, "by-us"))
        self.time("large down, cp", _run("cp", self.shared / "by-cp", self.here / "back"))
        self.time("large down, shared", lambda: self.workspace.file_download("by-us", self.here / "back"))
        for name in ("by-cp", "by-us"):
            (self.shared / name).unlink()


def main(rounds: int, partition: str, mib: int) -> None:
    slurm = SlurmOptions(partition=partition, time="60", cpus_per_task=1, mem="2G", setup=_setup())
    with (
        tempfile.TemporaryDirectory() as here,
        tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-") as shared,
        ApptainerWorkspace(runtime="process", slurm=slurm, mount_dir=shared) as workspace,
    ):
        _make_sources(Path(here), mib)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = []
        for _ in range(rounds):
            done.append(Round(workspace, Path(here), Path(shared)))
            done[-1].over_disk()
            done[-1].over_ssh()
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    _print([one.seconds for one in done], mib)
    print(f"\nThe client's memory grew by {grown_mib:.0f} MiB.")


def _setup() -> list[str]:
    """What makes the node's interpreter find a package that is on PYTHONPATH here."""
    return [f"export PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []


def _make_sources(here: Path, mib: int) -> None:
    with (here / "large").open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(_MIB))
    (here / "one").write_bytes(os.urandom(_MIB))
    for number in range(_SMALL_FILES):
        path = here / "small" / f"{number % 100:02}" / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(_SMALL_BYTES))


def _print(rounds: list[dict[str, float]], mib: int) -> None:
    print(f"{len(rounds)} rounds, {os.cpu_count()} CPUs, {mib} MiB large, {_SMALL_FILES} small files")
    print("| | by | median, ms | min | max | speed of its peer |\n|---|---|---|---|---|---|")
    for row in rounds[0]:
        what, _, by = row.partition(", ")
        times = [one[row] * 1000 for one in rounds]
        peer = f"{what}, {'cp' if by == 'shared' else 'scp'}"
        ratio = statistics.median(one[peer] / one[row] for one in rounds) if peer != row and peer in rounds[0] else None
        shown = "" if ratio is None else f"{ratio:.2f}"
        print(f"| {what} | {by} | {statistics.median(times):.0f} | {min(times):.0f} | {max(times):.0f} | {shown} |")


if __name__ == "__main__":
    given = [*sys.argv[1:], *("5", "cpu", "256")[len(sys.argv) - 1 :]]
    main(int(given[0]), given[1], int(given[2]))
