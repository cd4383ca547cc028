"""The command line: what each command does, in terms of the other modules."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from .base import ClusterError, State, say
from .enter import enter_argv, exec_status, find_node, require_node

NODES = ("login", "n01", "n02", "n03")


def check_file_system(state: State) -> None:
    """Refuse a state directory on which nodes cannot live.

    Raises:
        ClusterError: it is on overlayfs (overlays do not stack), or mounted nosuid or nodev.
    """
    best: tuple[int, list[str]] = (-1, [])
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        point = fields[4].rstrip("/") + "/"
        if (str(state.root) + "/").startswith(point) and len(point) >= best[0]:
            best = (len(point), fields)
    fields = best[1]
    kind, options = fields[fields.index("-") + 1], fields[5].split(",")
    wrong = [word for word in ("nosuid", "nodev", "noexec", "overlay") if word in [*options, kind]]
    if wrong:
        raise ClusterError(
            f"{state.root} is on a file system that is {', '.join(wrong)}: "
            "name another directory in HPC_WORKSPACE_CLUSTER_DIR"
        )


def up(state: State, *, accounting: bool) -> None:
    """Bring everything up that is not: network, nodes, links, daemons; then wait until Slurm calls all nodes usable."""
    from . import daemons, net, node, rootfs, slurm
    from .host import require_programs

    began = time.monotonic()
    require_programs()
    state.root.mkdir(parents=True, exist_ok=True)
    check_file_system(state)
    tree = rootfs.require_node_tree(state)
    running = {name: found for name in NODES if (found := find_node(state, name)) is not None}
    if running:
        tree = next(iter(running.values())).tree
        if accounting and not slurm.has_accounting(state):
            raise ClusterError("the cluster runs without accounting: `down` first")
    elif not (state.run / "up").exists():
        node.make_keys(state)
        node.make_homes(state, tree)
        slurm.write_configuration(state, tree, accounting=accounting)
        for name in NODES:
            node.make_disk(state, name, tree)
    since = time.time()
    fresh = [name for name in NODES if name not in running]
    net.start_network(state)
    state.run.mkdir(parents=True, exist_ok=True)
    (state.run / "up").touch()
    for name in NODES:
        start_node(state, name, tree)
        net.set_link(state, name, up=True)
    login = require_node(state, "login")
    slurm.wait_ready(login, [n for n in net.COMPUTE if n in fresh], since=since)
    slurm.wait_ready(login, [n for n in net.COMPUTE if n not in fresh], since=0)
    daemons.start_daemon(login, "registry")
    say(f"up ({time.monotonic() - began:.1f} s)")


def start_node(state: State, name: str, tree: Path) -> None:
    """Give the node power and start its daemons that do not run."""
    from . import daemons, node, slurm

    accounting = slurm.has_accounting(state)
    running = node.power_on(state, name, tree)
    for daemon in daemons.daemons_of(name, accounting=accounting):
        daemons.start_daemon(running, daemon)
        if daemon == "mariadbd":
            slurm.prepare_database(running)
        elif daemon == "slurmdbd":
            slurm.register_cluster(running)


def down(state: State) -> None:
    """Stop all of it and leave nothing running, mounted or named; the cache, /home and /shared stay."""
    from . import cgroups, net, node

    for name in reversed(NODES):
        node.power_cut(state, name)
    net.stop_network(state)
    cgroups.remove_cgroups(state)
    (state.run / "up").unlink(missing_ok=True)
    say("down")


def power_on(state: State, name: str) -> None:
    """Start a node again and wait until Slurm has it."""
    from . import rootfs, slurm

    if not (state.run / "up").exists():
        raise ClusterError("the cluster is down (cluster up)")
    since = time.time()
    others = [found for other in NODES if (found := find_node(state, other)) is not None]
    start_node(state, name, others[0].tree if others else rootfs.node_tree(state))
    login = find_node(state, "login")
    if name != "login" and login is not None:
        slurm.wait_ready(login, [name], since=since)


def set_proctrack(state: State, kind: str) -> None:
    """Make Slurm track processes with `kind`: only its own daemons start anew, and the controller calls all nodes usable.

    Raises:
        ClusterError: a node has no power, or the host no cgroup v1 for `cgroup`; nothing was changed.
    """
    from . import cgroups, daemons, net, slurm

    if kind == "cgroup" and not cgroups.controllers():
        raise ClusterError("this host does not mount cgroup v1: Slurm can only track with linuxproc")
    nodes = {name: require_node(state, name) for name in NODES}
    since = 0.0
    if slurm.proctrack(state) != kind:
        # All stop before the file changes: what runs has read it, even if we are interrupted, and what does not starts below.
        for name, node in nodes.items():
            daemons.stop_daemon(node, slurm.daemon_of(name))
        slurm.write_proctrack(state, kind)
        since = time.time()
    for name, node in nodes.items():
        daemons.start_daemon(node, slurm.daemon_of(name))
    slurm.wait_ready(nodes["login"], list(net.COMPUTE), since=since)
    say(f"proctrack: {kind}")


def status(state: State, *, as_json: bool) -> None:
    """Print what there is and what runs."""
    from . import daemons, net, slurm

    accounting = slurm.has_accounting(state)
    nodes = {}
    for name in NODES:
        found = find_node(state, name)
        wanted = daemons.daemons_of(name, accounting=accounting)
        nodes[name] = {
            "address": net.ADDRESSES[name],
            "power": found is not None,
            "link": net.link_state(state, name),
            "pid": found.pid if found else None,
            "daemons": {daemon: found is not None and daemons.is_running(found, daemon) for daemon in wanted},
        }
    images = sorted(path.name for path in (state.shared / "images").glob("*.sif"))
    facts = {
        "state_dir": str(state.root),
        "up": all(node["power"] for node in nodes.values()),
        "accounting": accounting,
        "proctrack": slurm.proctrack(state),
        "nodes": nodes,
        "images": images,
        "home": str(state.home),
        "shared": str(state.shared),
        "venv": (state.shared / "venv/bin/python").is_symlink(),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    settings = f"accounting: {'on' if accounting else 'off'}  proctrack: {facts['proctrack'] or 'none'}"
    print(f"{'up' if facts['up'] else 'not up'}  {state.root}  {settings}")
    for name, node in nodes.items():
        parts = " ".join(daemon if is_up else f"({daemon} stopped)" for daemon, is_up in node["daemons"].items())  # type: ignore[attr-defined]
        power = "on" if node["power"] else "off"
        print(f"{name:6} {node['address']:12} power {power:3}  link {node['link']:6}  {parts}")
    print(f"images: {' '.join(images) or 'none'}")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="cluster", description="A Slurm + Apptainer + sshd cluster in one box.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sub = commands.add_parser("up", help="start all that does not run")
    sub.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB, so that sacct works")
    commands.add_parser("down", help="stop all; the cache stays")
    sub = commands.add_parser("status", help="what runs")
    sub.add_argument("--json", action="store_true")
    sub = commands.add_parser("exec", help="run a command in a node: exec NODE [options] -- CMD...")
    sub.add_argument("node", choices=NODES)
    sub.add_argument("--user", default="root")
    sub.add_argument("--cwd", help="default: the user's home")
    sub.add_argument("--env", action="append", default=[], metavar="K=V")
    sub.set_defaults(cmd=[])  # what follows the first `--`; argparse would lose a second one
    for name, text in (
        ("power-cut", "end the node at once, cable first"),
        ("power-on", "start it again, on its old disk"),
        ("link-cut", "silence the node's network"),
        ("link-mend", "undo link-cut"),
    ):
        commands.add_parser(name, help=text).add_argument("node", choices=NODES)
    sub = commands.add_parser("daemon", help="stop or start one daemon of a node")
    sub.add_argument("verb", choices=("stop", "start"))
    sub.add_argument("node", choices=NODES)
    sub.add_argument("daemon")
    sub = commands.add_parser("proctrack", help="restart Slurm so that it tracks processes with cgroups or without")
    sub.add_argument("kind", choices=("linuxproc", "cgroup"))
    sub = commands.add_parser("install", help="put a built wheel and its dependencies into /shared/VENV")
    sub.add_argument("wheel_dir", nargs="?", type=Path, help="a directory with one wheel of hpc-workspace")
    sub.add_argument("--wheel", type=Path, help="the wheel itself")
    sub.add_argument("--extra", action="append", default=[], help="an extra of the wheel; may be repeated")
    sub.add_argument("--venv", default="venv", help="the virtual environment's name below /shared")
    sub = commands.add_parser("images", help="make the images that are missing")
    sub.add_argument("names", nargs="*", metavar="NAME")
    return top


def exec_in_node(state: State, arguments: argparse.Namespace) -> int:
    """Run the command of `cluster exec`; its exit status."""
    if not arguments.cmd:
        raise ClusterError("exec wants a command: exec NODE [options] -- CMD...")
    env: dict[str, str] = {}
    for pair in arguments.env:
        key, sign, value = pair.partition("=")
        if not key or not sign:
            raise ClusterError(f"--env wants K=V, not {pair!r}")
        env[key] = value
    node = require_node(state, arguments.node)
    return exec_status(enter_argv(node, arguments.cmd, user=arguments.user, cwd=arguments.cwd, env=env))


def dispatch(state: State, arguments: argparse.Namespace) -> int:
    """Do one command; the status to end with."""
    command = arguments.command
    if command == "exec":
        return exec_in_node(state, arguments)
    if command == "status":
        status(state, as_json=arguments.json)
        return 0
    if command == "install":
        from .install import install

        with state.locked("install.lock"):
            install(state, arguments.wheel, arguments.wheel_dir, arguments.extra, venv=arguments.venv)
        return 0
    if command == "images":
        from .images import make_images

        with state.locked("images.lock"):
            make_images(state, arguments.names)
        return 0
    from . import daemons, net, node, slurm

    with state.locked():
        if command == "up":
            up(state, accounting=arguments.accounting)
        elif command == "down":
            down(state)
        elif command == "power-cut":
            node.power_cut(state, arguments.node)
        elif command == "power-on":
            power_on(state, arguments.node)
        elif command in ("link-cut", "link-mend"):
            require_node(state, arguments.node)
            net.set_link(state, arguments.node, up=command == "link-mend")
        elif command == "proctrack":
            set_proctrack(state, arguments.kind)
        elif command == "daemon":
            daemons.require_daemon(arguments.node, arguments.daemon, accounting=slurm.has_accounting(state))
            act = daemons.stop_daemon if arguments.verb == "stop" else daemons.start_daemon
            act(require_node(state, arguments.node), arguments.daemon)
    return 0


def main() -> int:
    """Run the command line; 2 for wrong usage, 1 for a failure with one message on stderr."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments = parser().parse_args(words[:end])
    if end < len(words) and arguments.command == "exec":
        arguments.cmd = words[end + 1 :]
    try:
        return dispatch(State.from_environment(), arguments)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
