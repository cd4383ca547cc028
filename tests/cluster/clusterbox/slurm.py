"""Slurm's configuration on the nodes, and what the controller says of them."""

from __future__ import annotations

import calendar
import os
import re
import time
from pathlib import Path

from . import files
from .base import State, wait_until
from .cgroups import controllers
from .enter import Node, node_run
from .node import account_ids
from .rootfs import USERS

_BAD_STATE = re.compile(r"DOWN|NOT_RESPONDING|UNKNOWN|DRAIN|REBOOT|POWER")


def write_configuration(state: State, tree: Path, *, accounting: bool) -> None:
    """Write /etc/slurm, one directory for all nodes."""
    directory = state.etc / "slurm"
    directory.mkdir(parents=True, exist_ok=True)
    state.etc.chmod(0o755)
    directory.chmod(0o755)
    (directory / "slurm.conf").write_text(files.slurm_conf(cgroups=bool(controllers()), accounting=accounting))
    (directory / "cgroup.conf").write_text(files.cgroup_conf())
    (directory / "slurmdbd.conf").write_text(files.slurmdbd_conf())
    (directory / "slurmdbd.conf").chmod(0o600)  # slurmdbd insists
    os.chown(directory / "slurmdbd.conf", *account_ids(tree, "slurm"))


def has_accounting(state: State) -> bool:
    """Whether the cluster was started with accounting."""
    try:
        return "slurmdbd" in (state.etc / "slurm/slurm.conf").read_text()
    except FileNotFoundError:
        return False


def daemon_of(node_name: str) -> str:
    """The node's daemon that reads ProctrackType."""
    return "slurmctld" if node_name == "login" else "slurmd"


def proctrack(state: State) -> str | None:
    """What Slurm tracks processes with, `cgroup` or `linuxproc`; None if the cluster never was up."""
    try:
        text = (state.etc / "slurm/slurm.conf").read_text()
    except FileNotFoundError:
        return None
    found = re.search(r"^ProctrackType=proctrack/(\w+)$", text, re.MULTILINE)
    return found.group(1) if found else None


def write_proctrack(state: State, kind: str) -> None:
    """Write slurm.conf anew with that way of tracking; the rest of it stays. A reader sees the old file or the new."""
    path = state.etc / "slurm/slurm.conf"
    part = path.with_name("slurm.conf.part")
    part.write_text(files.slurm_conf(cgroups=kind == "cgroup", accounting=has_accounting(state)))
    os.replace(part, path)


def parse_node(text: str) -> tuple[str, float]:
    """State and start time of slurmd (0 if never) from `scontrol show node -o`. Times are UTC, as the nodes' clock."""
    found = re.search(r"\bState=(\S+)", text)
    state = found.group(1) if found else "UNKNOWN"
    started = re.search(r"\bSlurmdStartTime=(\d\S+)", text)
    if not started:
        return state, 0.0
    return state, float(calendar.timegm(time.strptime(started.group(1), "%Y-%m-%dT%H:%M:%S")))


def wait_ready(login: Node, names: list[str], *, since: float, timeout_s: float = 60.0) -> None:
    """Block until the controller calls each node usable, by a slurmd that started not before `since` (epoch seconds).

    Raises:
        ClusterError: not within `timeout_s`.
    """
    for name in names:

        def is_ready(name: str = name) -> bool:
            done = node_run(login, ["scontrol", "show", "node", "-o", name], check=False)
            state, started = parse_node(done.stdout)
            return done.returncode == 0 and not _BAD_STATE.search(state) and "*" not in state and started >= int(since)

        wait_until(f"{name} in Slurm", is_ready, timeout_s=timeout_s, interval_s=0.1)


def prepare_database(login: Node) -> None:
    """Make the accounting database and its user. Source: MariaDB, `IDENTIFIED VIA unix_socket`: no password."""
    sql = (
        "CREATE DATABASE IF NOT EXISTS slurm_acct_db;"
        "CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED VIA unix_socket;"
        "GRANT ALL ON slurm_acct_db.* TO slurm@localhost;"
    )
    socket = "--socket=/run/mysqld/mysqld.sock"
    is_up = ["mariadb-admin", socket, "ping"]
    wait_until("MariaDB", lambda: node_run(login, is_up, check=False).returncode == 0, timeout_s=60, interval_s=0.2)
    node_run(login, ["mariadb", socket], stdin=sql)


def register_cluster(login: Node) -> None:
    """Make the cluster and the users known to slurmdbd before slurmctld asks for them.

    Without it the first jobs are missing from sacct for some 10 s. Source: sacctmgr(1).
    """
    ask = ["sacctmgr", "-n", "show", "cluster"]
    wait_until("slurmdbd", lambda: node_run(login, ask, check=False).returncode == 0, timeout_s=60, interval_s=0.1)
    if files.CLUSTER_NAME in node_run(login, ask).stdout.split():
        return
    node_run(login, ["sacctmgr", "-i", "add", "cluster", files.CLUSTER_NAME])
    node_run(login, ["sacctmgr", "-i", "add", "account", "research"])
    node_run(login, ["sacctmgr", "-i", "add", "user", ",".join(USERS), "account=research"])
