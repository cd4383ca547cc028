"""The daemons of the nodes: how each is started, told apart, stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .base import ClusterError, wait_until
from .enter import Node, node_run


@dataclass(frozen=True)
class Daemon:
    """A daemon: its program, its PID file, its user, and whether it must be put into the background."""

    program: str
    pidfile: str
    user: str = "root"
    arguments: tuple[str, ...] = ()
    background: bool = False
    run_dirs: tuple[str, ...] = ()


DAEMONS = {
    "munged": Daemon("/usr/sbin/munged", "/run/munge/munged.pid", user="munge", run_dirs=("/run/munge",)),
    "sshd": Daemon("/usr/sbin/sshd", "/run/sshd.pid", run_dirs=("/run/sshd",)),
    "slurmctld": Daemon("/usr/sbin/slurmctld", "/run/slurmctld.pid"),
    "slurmd": Daemon("/usr/sbin/slurmd", "/run/slurmd.pid"),
    "registry": Daemon(
        "/usr/bin/docker-registry",
        "/run/registry.pid",
        arguments=("serve", "/etc/docker/registry/config.yml"),
        background=True,
    ),
    "mariadbd": Daemon(
        "/usr/sbin/mariadbd",
        "/run/mariadbd.pid",
        user="mysql",
        arguments=("--skip-networking", "--socket=/run/mysqld/mysqld.sock"),
        background=True,
        run_dirs=("/run/mysqld",),
    ),
    "slurmdbd": Daemon("/usr/sbin/slurmdbd", "/run/slurmdbd/slurmdbd.pid", user="slurm", run_dirs=("/run/slurmdbd",)),
}


def daemons_of(node_name: str, *, accounting: bool) -> list[str]:
    """The daemons that the node runs, in the order in which they start."""
    if node_name != "login":
        return ["munged", "sshd", "slurmd"]
    return ["munged", "sshd", *(["mariadbd", "slurmdbd"] if accounting else []), "slurmctld", "registry"]


def is_running(node: Node, name: str) -> bool:
    """Whether the daemon that its PID file names is alive; asked without entering the node."""
    daemon = DAEMONS[name]
    try:
        pid = int((node.root / daemon.pidfile.lstrip("/")).read_text().split()[0])
        command = (node.root / "proc" / str(pid) / "comm").read_text().strip()  # at most 15 characters
    except (OSError, ValueError, IndexError):
        return False
    return command == Path(daemon.program).name[:15]


def start_daemon(node: Node, name: str) -> None:
    """Start the daemon if it does not run.

    Source: start-stop-daemon(8) of dpkg 1.22; all but two daemons detach by themselves, when they are ready.

    Raises:
        ClusterError: it did not start; the message has what it said.
    """
    if is_running(node, name):
        return
    daemon = DAEMONS[name]
    for directory in daemon.run_dirs:
        node_run(node, ["install", "-d", "-m", "0755", "-o", daemon.user, directory])
    argv = ["start-stop-daemon", "--start", "--oknodo", "--pidfile", daemon.pidfile, "--exec", daemon.program]
    if daemon.user != "root":
        argv += ["--chuid", daemon.user]
    if daemon.background:
        argv += ["--background", "--make-pidfile", "--output", f"/var/log/{name}.log"]
    node_run(node, [*argv, "--", *daemon.arguments])
    wait_until(f"{name} on {node.name}", lambda: is_running(node, name), timeout_s=20)


def stop_daemon(node: Node, name: str) -> None:
    """Stop the daemon and wait until it is gone; what it started (sessions, job steps) lives on.

    Raises:
        ClusterError: this node does not run it.
    """
    daemon = DAEMONS[name]
    argv = ["start-stop-daemon", "--stop", "--oknodo", "--remove-pidfile", "--retry", "TERM/15/KILL/5"]
    node_run(node, [*argv, "--pidfile", daemon.pidfile, "--exec", daemon.program])


def require_daemon(node_name: str, name: str, *, accounting: bool) -> None:
    """Check that the node runs such a daemon.

    Raises:
        ClusterError: it does not; the message says which it runs.
    """
    present = daemons_of(node_name, accounting=accounting)
    if name not in present:
        raise ClusterError(f"{node_name} runs no {name}; it runs {', '.join(present)}")
