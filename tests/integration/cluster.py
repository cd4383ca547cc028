"""The test cluster as the tests see it: commands in its nodes, as an ordinary user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NODES = ("login", "n01", "n02", "n03")
COMPUTE = NODES[1:]
VENV = "/shared/venv/bin"
TINY, SERVER = "/shared/images/tiny.sif", "/shared/images/agent-server.sif"
_QUIET_TIMEOUT_S = 15
TOLD = "TOLD "
_SESSION = """
import glob, json, sys
found = {}
for path in glob.glob("/proc/[0-9]*"):
    try:
        environ, argv = open(path + "/environ", "rb").read(), open(path + "/cmdline", "rb").read()
        name = open(path + "/comm").read().strip()
    except OSError:
        continue
    if b"HPC_WORKSPACE_SESSION=" + sys.argv[1].encode() in environ:
        found[path[6:]] = name
    elif b"-m\\0hpc_workspace.node\\0" in argv and argv.strip(b"\\0").endswith(sys.argv[1].encode()):
        found[path[6:]] = "node program"
print(json.dumps(found))
"""
# What pieces of Python that run in a node begin with.
PRELUDE = f"""
import json, os, signal, subprocess, sys, time
from pathlib import Path
from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace, errors
from hpc_workspace.errors import WorkspaceError
TINY, SERVER = {TINY!r}, {SERVER!r}
SLURM = SlurmOptions(partition="cpu", time="00:10:00", mem="2G")
def tell(**values):
    print({TOLD!r} + json.dumps(values), flush=True)
def error_of(call):
    try:
        call()
    except WorkspaceError as error:
        return {{"kind": type(error).__name__, "text": str(error)}}
    return None
def warden_of(workspace):
    return int(workspace._record.owner.split()[3])
def program_of(workspace):
    warden = warden_of(workspace)
    return int(Path(f"/proc/{{warden}}/task/{{warden}}/children").read_text().split()[0])
"""


def why_no_cluster() -> str:
    """Why the cluster can't run here, and what to do about it; empty if it can."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    if os.geteuid() != 0:
        return "it needs root (namespaces, mounts, cgroups): run as root"
    if not shutil.which("apt-get"):
        return "it needs a Debian host with apt-get and mmdebstrap"
    return ""


class Cluster:
    """Runs `tests/cluster/cluster`."""

    def __init__(self, repo: Path) -> None:
        self._repo = repo
        self._program = str(repo / "tests/cluster/cluster")
        self._was_up = False
        self._is_anew = False

    def bring_up(self, *, accounting: bool = False) -> None:
        """Cluster, images and the built wheel; each step only where it is missing. With accounting it starts anew."""
        status = json.loads(self.call("status", "--json").stdout)
        self._was_up = status["up"]
        if accounting and not (status["up"] and status["accounting"]):
            self._is_anew = True
            self.call("down")
        self.call("up", *(["--accounting"] if accounting else []))
        self.call("images")
        with tempfile.TemporaryDirectory() as folder:
            argv = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(self._repo)]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            self.call("install", folder)
        versions = self.run("login", ["sh", "-c", "sbatch --version; apptainer --version; ssh -V 2>&1"]).stdout
        sys.stderr.write(f"\ncluster lane: {', '.join(versions.split(chr(10)))}\n")

    def leave(self) -> None:
        """Leave the cluster as it was."""
        if self._is_anew or not self._was_up:
            self.call("down")
        if self._is_anew and self._was_up:
            self.call("up")

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One command of the cluster's own; its failure is the test's."""
        ended = subprocess.run([self._program, *arguments], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"cluster {' '.join(arguments)}: {ended.stderr}"
        return ended

    def argv(self, node: str, command: Sequence[str], user: str = "tester") -> list[str]:
        return [self._program, "exec", node, "--user", user, "--", *command]

    def run(
        self, node: str, command: Sequence[str], *, user: str = "tester", timeout_s: float = 180, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """A command in a node, to its end."""
        return subprocess.run(
            self.argv(node, command, user), capture_output=True, text=True, input=stdin, timeout=timeout_s, check=False
        )

    def python(self, node: str, code: str, *, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        """A piece of Python in a node, with the wheel installed."""
        return self.run(node, [f"{VENV}/python", "-c", code], timeout_s=timeout_s)

    def tell(
        self, node: str, code: str, *, env: Mapping[str, str] | None = None, timeout_s: float = 180
    ) -> dict[str, Any]:
        """What a piece of Python in a node tells by calling `tell(name=value, …)`, and its stderr as `stderr`.

        `PRELUDE` stands before it. A piece that fails fails the test.
        """
        flags = [f"--env={name}={value}" for name, value in (env or {}).items()]
        command = [f"{VENV}/python", "-c", PRELUDE + code]
        argv = [self._program, "exec", node, "--user", "tester", *flags, "--", *command]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        told: dict[str, Any] = {"stderr": ended.stderr}
        for line in ended.stdout.splitlines():
            if line.startswith(TOLD):
                told |= json.loads(line.removeprefix(TOLD))
        return told

    def open(self, node: str, command: Sequence[str]) -> subprocess.Popen[str]:
        """A command in a node that the test talks to."""
        return subprocess.Popen(
            self.argv(node, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def session(self, node: str, workspace_id: str) -> dict[int, str]:
        """The processes on `node` that carry the mark of a workspace, and its two node programs: id and name."""
        found = json.loads(self.run(node, ["python3", "-c", _SESSION, workspace_id], user="root").stdout)
        return {int(pid): name for pid, name in found.items()}

    def kill(self, node: str, *pids: int, number: int = signal.SIGKILL) -> None:
        """Signal processes at one blow: none of them has the time to do something about the others."""
        self.run(node, ["kill", f"-{int(number)}", *map(str, pids)], user="root")

    def power_on(self, node: str) -> None:
        """A node whose power was cut, as one that has booted anew: with another boot id in what it left on its disk.

        One kernel runs the box, and its boot id stays the same.
        """
        self.call("power-on", node)
        other = "s/ [0-9a-f-]{36} / 00000000-0000-0000-0000-000000000000 /"
        self.run(node, ["sh", "-c", f"sed -E -i '{other}' /tmp/hpcws-*/owner"], user="root")

    def leftovers(self, nodes: Sequence[str] = COMPUTE) -> dict[str, str]:
        """What of the tester's is left on nodes or in the queue: processes, mounts, scratch, jobs. Empty if all is gone.

        A job that has just ended is given time to leave the queue: the wait is Slurm's, in `scontrol wait_job`-like
        looks by squeue itself (`--iterate` has no end), so a loop of `srun true` would be no more of an event.
        """
        found = {}
        script = (
            f"for i in $(seq {_QUIET_TIMEOUT_S * 5}); do "
            'left="$(ps -u tester -o args= | grep -v -e "^sh -c" -e "^ps -u" -e "^grep" -e "^sleep" -e "^seq")'
            '$(find /tmp -maxdepth 1 -name "hpcws-*" -user tester)'
            '$(grep -l hpcws- /proc/[0-9]*/mountinfo 2>/dev/null | xargs -r stat -c "%U %n" 2>/dev/null | grep ^tester)"; '
            '[ -z "$left" ] && exit 0; sleep 0.2; done; echo "$left"'
        )
        for node in nodes:
            if left := self.run(node, ["sh", "-c", script], user="root").stdout.strip():
                found[node] = left
        if jobs := self.run("login", ["squeue", "--noheader", "--user=tester"]).stdout.strip():
            found["queue"] = jobs
        return found
