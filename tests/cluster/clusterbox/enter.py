"""Running a command in a node: its cgroup joined, all its namespaces entered, a user's identity, a clean environment.

Light on purpose (`cluster exec` is called thousands of times): it reads one file and imports little.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from .base import ClusterError, State
from .cgroups import procs_files

PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

# Joins cgroups (files, then --), then becomes the rest. A constant script: values only ever are arguments.
_JOIN = 'while [ "$1" != -- ]; do echo 0 >"$1"; shift; done; shift; exec "$@"'
_SH = "/bin/sh"


class Node:
    """A node that has power: the host's id of its PID 1, and the tree whose users it knows."""

    def __init__(self, state: State, name: str, pid: int, tree: Path) -> None:
        self.state = state
        self.name = name
        self.pid = pid
        self.tree = tree

    @property
    def root(self) -> Path:
        """The node's file system as the host sees it."""
        return Path(f"/proc/{self.pid}/root")


def start_time(pid: int) -> str | None:
    """When the process began, in clock ticks since boot, or None. Source: proc_pid_stat(5), field 22."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def find_node(state: State, name: str) -> Node | None:
    """The node, or None when it has no power."""
    try:
        record = json.loads((state.run / f"{name}.json").read_text())
    except FileNotFoundError:
        return None
    if start_time(record["pid"]) != record["start_time"]:
        return None
    return Node(state, name, record["pid"], Path(record["tree"]))


def require_node(state: State, name: str) -> Node:
    """The node.

    Raises:
        ClusterError: it has no power.
    """
    node = find_node(state, name)
    if node is None:
        raise ClusterError(f"{name} has no power (cluster up, or cluster power-on {name})")
    return node


def _account(node: Node, user: str) -> tuple[str, str]:
    """Home and shell of a user of the nodes."""
    for line in (node.tree / "etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if fields[0] == user:
            return fields[5], fields[6]
    raise ClusterError(f"the nodes have no user {user!r}")


def enter_argv(
    node: Node, argv: Sequence[str], *, user: str = "root", cwd: str | None = None, env: Mapping[str, str] | None = None
) -> list[str]:
    """The host's command line that runs `argv` in the node.

    Killed itself, it takes nsenter with it, and the command gets SIGHUP, as with a lost terminal.

    Source: nsenter(1), setpriv(1) of util-linux 2.38 and 2.41, env(1) of coreutils 9.7.
    """
    home, shell = _account(node, user)
    variables = {
        "PATH": PATH,
        "HOME": home,
        "USER": user,
        "LOGNAME": user,
        "SHELL": shell,
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM") or "dumb",
        **(env or {}),
    }
    words = [_SH, "-c", _JOIN, "sh", *procs_files(node.state, node.name), "--"]
    words += ["setpriv", "--pdeathsig", "KILL", "nsenter", "--target", str(node.pid), "--all", "--"]
    words += ["/usr/bin/setpriv", "--reuid", user, "--regid", user, "--init-groups", "--pdeathsig", "HUP", "--"]
    words += ["/usr/bin/env", "-i", f"--chdir={cwd or (home if user != 'root' else '/')}"]
    return [*words, *(f"{key}={value}" for key, value in variables.items()), *argv]


def node_run(
    node: Node,
    argv: Sequence[str],
    *,
    user: str = "root",
    check: bool = True,
    log: Path | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the node to its end and return what it said.

    Raises:
        ClusterError: with `check`, it ended with another status than 0.
    """
    from .base import run

    return run(enter_argv(node, argv, user=user), check=check, log=log, stdin=stdin)


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def exec_status(argv: Sequence[str]) -> int:
    """Run what `enter_argv` made with our own standard streams; its exit status, 128+n after signal n.

    Signals that somebody sends to us (not the terminal, which reaches the command by itself) are passed to the command
    in the node, past nsenter, which does not pass them on.
    """
    forwarded = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
    watched = forwarded | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    child = subprocess.Popen(argv, env=env, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, watched))
    while True:
        # The look before the wait: SIGCHLD stays pending while blocked, so none is missed.
        status = child.poll()
        if status is not None:
            return status if status >= 0 else 128 - status
        info = signal.sigwaitinfo(watched)
        if info.si_signo != signal.SIGCHLD and info.si_code <= 0:  # SI_USER and its kin; SI_KERNEL is the terminal's
            for pid in _children(child.pid) or [child.pid]:
                os.kill(pid, info.si_signo)
