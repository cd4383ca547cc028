"""What every module here shares: where the state lives, how a program is run, how a failure is told.

Nothing here knows about Slurm, images or nodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

STATE_VARIABLE = "HPC_WORKSPACE_CLUSTER_DIR"
DEFAULT_STATE_DIR = Path("/var/tmp/hpc-workspace-cluster")

# What a program of the host sees when we run it: none of the caller's PYTHON*, PIP_* or SLURM_*.
HOST_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/",
    "DEBIAN_FRONTEND": "noninteractive",
}


class ClusterError(Exception):
    """Something that the user must know, in one message; the command ends with status 1."""


class State:
    """Paths in the state directory; `cache` survives `down`, `run` and `nodes` belong to one life of the cluster."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "cache"
        self.run = root / "run"
        self.nodes = root / "nodes"
        self.etc = root / "etc"
        self.keys = root / "keys"
        self.home = root / "home"
        self.shared = root / "shared"
        self.registry = root / "registry"
        # Two clusters of two state directories must not meet in the host's names of cgroups and network namespaces.
        self.tag = "hpcw" + hashlib.sha256(str(root).encode()).hexdigest()[:4]

    @classmethod
    def from_environment(cls) -> State:
        """The state directory that the environment names, else the default one."""
        return cls(Path(os.environ.get(STATE_VARIABLE) or DEFAULT_STATE_DIR).resolve())

    @contextlib.contextmanager
    def locked(self, name: str = "lock") -> Iterator[None]:
        """Hold the cluster's lock of that name, so that two commands which change the same thing take turns."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def say(text: str) -> None:
    """Tell progress on stderr; stdout belongs to results."""
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    check: bool = True,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, without a shell.

    Args:
        argv: the program and its arguments.
        env: variables on top of a clean environment.
        log: a file that gets all output instead of the result.
        check: whether a status other than 0 is an error.
        stdin: text for its standard input; absent means /dev/null.

    Raises:
        ClusterError: not found, or (with check) failed; the message has the last lines of its output.
    """
    words = [os.fspath(word) for word in argv]
    full_env = {**HOST_ENV, **(env or {})}
    with contextlib.ExitStack() as stack:
        out: int | object = subprocess.PIPE
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(log.open("ab"))
        try:
            done = subprocess.run(
                words,
                env=full_env,
                stdout=out,  # type: ignore[arg-type]
                stderr=subprocess.STDOUT if log is not None else subprocess.PIPE,
                stdin=None if stdin is not None else subprocess.DEVNULL,
                input=stdin,
                text=True,
                errors="replace",
            )
        except FileNotFoundError as error:
            raise ClusterError(f"{words[0]} is not installed on this host") from error
    if check and done.returncode != 0:
        text = log.read_text(errors="replace") if log is not None else (done.stdout or "") + (done.stderr or "")
        tail = "\n".join(text.strip().splitlines()[-15:])
        raise ClusterError(f"`{' '.join(words)[:300]}` ended with status {done.returncode}:\n{tail}")
    return done


def digest(*parts: str) -> str:
    """A short name for what was made from `parts`."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def mounts_below(path: Path) -> list[str]:
    """Mount points at or below `path` in this mount namespace.

    Source: proc_pid_mountinfo(5), field 5, octal escapes for blanks.
    """
    prefix = str(path.resolve())
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point == prefix or point.startswith(prefix.rstrip("/") + "/"):
            found.append(point)
    return found


def remove_tree(path: Path) -> None:
    """Delete a directory tree, but never one that has something mounted inside.

    Raises:
        ClusterError: something is mounted at or below `path`; nothing was deleted.
    """
    if not os.path.lexists(path):
        return
    if mounted := mounts_below(path):
        raise ClusterError(f"{path} is not deleted: mounted inside are {', '.join(mounted[:5])}")
    # --one-file-system: a second guard, should a mount appear after the look above.
    run(["rm", "-rf", "--one-file-system", "--", path])


def wait_until(what: str, is_done: object, *, timeout_s: float, interval_s: float = 0.05) -> None:
    """Block until the callable `is_done` is true.

    Raises:
        ClusterError: it was not within `timeout_s`; the message names `what`.
    """
    assert callable(is_done)
    deadline = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(interval_s)
