"""A node's life: its disk, its start, its power cut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from . import files
from .base import HOST_ENV, ClusterError, State, remove_tree, run, wait_until
from .cgroups import controllers as cgroup_controllers
from .cgroups import kill_all, leave_node_cgroups, make_node_cgroups, procs_files, remove_cgroups
from .enter import Node, find_node, start_time
from .net import NODES, netns, pids_of, plug, unplug
from .rootfs import USERS

INIT_SCRIPT = Path(__file__).with_name("node_init.sh")


def account_ids(tree: Path, name: str) -> tuple[int, int]:
    """Uid and gid of an account of the tree. Source: passwd(5)."""
    for line in (tree / "etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if fields[0] == name:
            return int(fields[2]), int(fields[3])
    raise ClusterError(f"{tree} has no account {name}")


def put(tree: Path, upper: Path, path: str, content: str | bytes, *, mode: int = 0o644, owner: str = "root") -> None:
    """Write a file into a node's layer; directories on the way get the tree's own mode and owner."""
    directory = upper
    for part in Path(path.lstrip("/")).parts[:-1]:
        directory = directory / part
        if not directory.exists():
            directory.mkdir()
            below = tree / directory.relative_to(upper)
            if below.exists():
                like = below.stat()
                os.chown(directory, like.st_uid, like.st_gid)
                directory.chmod(like.st_mode & 0o7777)
    target = upper / path.lstrip("/")
    target.write_bytes(content if isinstance(content, bytes) else content.encode())
    target.chmod(mode)
    os.chown(target, *account_ids(tree, owner))


def make_keys(state: State) -> None:
    """Make what is missing of the munge key, the nodes' host keys and the users' keys."""
    state.keys.mkdir(parents=True, exist_ok=True)
    state.keys.chmod(0o700)
    if not (state.keys / "munge.key").exists():
        (state.keys / "munge.key").write_bytes(os.urandom(1024))
    for name, comment in [(f"host-{node}", node) for node in NODES] + [(f"user-{user}", user) for user in USERS]:
        if not (state.keys / f"{name}.pub").exists():
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", state.keys / name])


def make_homes(state: State, tree: Path) -> None:
    """Make the shared directories, and each user's home with a key that opens its own account on all nodes."""
    for directory, mode in ((state.home, 0o755), (state.shared, 0o755), (state.shared / "images", 0o755)):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(mode)
    scratch = state.shared / "scratch"
    scratch.mkdir(exist_ok=True)
    scratch.chmod(0o1777)
    for user, uid in USERS.items():
        home = state.home / user
        if not home.exists():
            home.mkdir(mode=0o700)
            for skeleton in (tree / "etc/skel").iterdir():
                (home / skeleton.name).write_bytes(skeleton.read_bytes())
        (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
        public = (state.keys / f"user-{user}.pub").read_bytes()
        for name, content, mode in (
            ("id_ed25519", (state.keys / f"user-{user}").read_bytes(), 0o600),
            ("id_ed25519.pub", public, 0o644),
            ("authorized_keys", public, 0o600),
        ):
            path = home / ".ssh" / name
            if not path.exists():
                path.write_bytes(content)
                path.chmod(mode)
        if home.stat().st_uid != uid:
            run(["chown", "-R", f"{uid}:{uid}", home])


def make_disk(state: State, name: str, tree: Path) -> None:
    """Give the node an empty disk: a layer over the tree with its own configuration, and a directory for /tmp."""
    directory = state.nodes / name
    remove_tree(directory)
    for part in ("upper", "work", "root", "tmp"):
        (directory / part).mkdir(parents=True)
    (directory / "tmp").chmod(0o1777)
    upper = directory / "upper"
    public = {node: (state.keys / f"host-{node}.pub").read_text() for node in NODES}
    put(tree, upper, "/etc/hostname", f"{name}\n")
    put(tree, upper, "/etc/hosts", files.hosts())
    put(tree, upper, "/etc/machine-id", f"{files.CLUSTER_NAME.encode().hex():0<16}{name.encode().hex():0<16}\n")
    put(tree, upper, "/etc/munge/munge.key", (state.keys / "munge.key").read_bytes(), mode=0o400, owner="munge")
    put(tree, upper, "/etc/ssh/ssh_host_ed25519_key", (state.keys / f"host-{name}").read_bytes(), mode=0o600)
    put(tree, upper, "/etc/ssh/ssh_host_ed25519_key.pub", public[name])
    put(tree, upper, "/etc/ssh/ssh_known_hosts", files.known_hosts(public))
    put(tree, upper, "/etc/ssh/sshd_config.d/cluster.conf", files.sshd_config())
    put(tree, upper, "/etc/docker/registry/config.yml", files.registry_config())
    for spool, owner in (("slurmd", "root"), ("slurmctld", "slurm")):
        put(tree, upper, f"/var/spool/{spool}/.keep", "")
        os.chown(upper / "var/spool" / spool, *account_ids(tree, owner))
    (upper / "etc/slurm").mkdir(exist_ok=True)
    (upper / "srv/images").mkdir(parents=True, exist_ok=True)


def power_on(state: State, name: str, tree: Path) -> Node:
    """Start the node: cable, namespaces, file systems, PID 1; no daemon yet. Its disk is as it was left.

    Raises:
        ClusterError: it did not come up; the message has the end of its log.
    """
    if (node := find_node(state, name)) is not None:
        return node
    directory = state.nodes / name
    make_node_cgroups(state, name)
    plug(state, name)
    binds = [directory / "tmp", "/tmp", state.home, "/home", state.shared, "/shared"]
    binds += [state.etc / "slurm", "/etc/slurm"]
    if name == "login":
        for path in (state.registry, state.cache / "images"):
            path.mkdir(parents=True, exist_ok=True)
        binds += [state.registry, "/var/lib/docker-registry", state.cache / "images", "/srv/images"]
    # The cgroup namespace's root is the cgroup that unshare is in: the node's, not yet its `init`.
    join = 'while [ "$1" != -- ]; do echo 0 >"$1"; shift; done; shift; exec "$@"'
    argv = ["sh", "-c", join, "sh", *procs_files(state, name, "."), "--"]
    argv += ["nsenter", f"--net=/run/netns/{netns(state, name)}"]
    argv += ["unshare", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--fork", "--kill-child=KILL"]
    argv += ["sh", str(INIT_SCRIPT), name, str(tree), str(directory), " ".join(cgroup_controllers()), *map(str, binds)]
    log = directory / "init.log"
    with log.open("wb") as out:
        outer = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=HOST_ENV, start_new_session=True, cwd="/"
        )

    def inner() -> int | None:
        if outer.poll() is not None:
            raise ClusterError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        words = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if words and Path(f"/proc/{words[0]}/comm").read_text().strip() == "tini":
            return int(words[0])
        return None

    wait_until(f"PID 1 of {name}", inner, timeout_s=20, interval_s=0.01)
    pid = inner()
    assert pid is not None
    leave_node_cgroups(state, outer.pid)
    state.run.mkdir(parents=True, exist_ok=True)
    record = {"pid": pid, "start_time": start_time(pid), "tree": str(tree)}
    (state.run / f"{name}.json.part").write_text(json.dumps(record))
    os.replace(state.run / f"{name}.json.part", state.run / f"{name}.json")
    return Node(state, name, pid, tree)


def power_cut(state: State, name: str) -> None:
    """End the node at once: first the cable, so that nobody hears a farewell, then every process of it."""
    unplug(state, name)
    node = find_node(state, name)
    if node is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.pid, signal.SIGKILL)  # PID 1 of a PID namespace takes all with it, pid_namespaces(7)
    kill_all(state, name)
    deadline = time.monotonic() + 15
    while pids := pids_of(state, name):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ClusterError(f"processes of {name} outlived SIGKILL: {sorted(pids)}")
        time.sleep(0.02)
    remove_cgroups(state, name)
    (state.run / f"{name}.json").unlink(missing_ok=True)
