"""The cluster's network: a bridge in a network namespace of its own, one more namespace a node.

Nodes reach each other and nothing else; nothing of the host's own network is changed.
"""

from __future__ import annotations

from pathlib import Path

from .base import State, run

NODES = ("login", "n01", "n02", "n03")
COMPUTE = NODES[1:]
ADDRESSES = {"login": "10.77.0.1", "n01": "10.77.0.11", "n02": "10.77.0.12", "n03": "10.77.0.13"}
NETNS_DIR = Path("/run/netns")  # ip-netns(8)


def netns(state: State, name: str) -> str:
    """The network namespace's name of a node, or of the bridge (`net`)."""
    return f"{state.tag}-{name}"


def _ip(*words: str, check: bool = True) -> str:
    return run(["ip", *words], check=check).stdout


def is_network_up(state: State) -> bool:
    """Whether the bridge's namespace is there."""
    return (NETNS_DIR / netns(state, "net")).exists()


def start_network(state: State) -> None:
    """Make the bridge and the nodes' namespaces; those that are there stay."""
    bridge = netns(state, "net")
    if not is_network_up(state):
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
    for node in NODES:
        if not (NETNS_DIR / netns(state, node)).exists():
            _ip("netns", "add", netns(state, node))
            _ip("-n", netns(state, node), "link", "set", "lo", "up")


def stop_network(state: State) -> None:
    """Remove all namespaces; the links go with them."""
    for name in (*NODES, "net"):
        if (NETNS_DIR / netns(state, name)).exists():
            _ip("netns", "delete", netns(state, name))


def plug(state: State, node: str) -> None:
    """Give the node its cable (a veth pair to the bridge) and its address."""
    bridge, inside = netns(state, "net"), netns(state, node)
    unplug(state, node)
    _ip("-n", bridge, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", inside)
    _ip("-n", inside, "addr", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
    _ip("-n", inside, "link", "set", "eth0", "up")
    _ip("-n", bridge, "link", "set", node, "master", "br0", "up")


def unplug(state: State, node: str) -> None:
    """Take the cable away, with all that is in flight."""
    _ip("-n", netns(state, "net"), "link", "delete", node, check=False)


def set_link(state: State, node: str, *, up: bool) -> None:
    """Cut or mend the node's link at the switch's side: connections stay open and fall silent."""
    _ip("-n", netns(state, "net"), "link", "set", node, "up" if up else "down")


def link_state(state: State, node: str) -> str:
    """`up`, `cut`, or `absent` (no cable: the node has no power)."""
    if not is_network_up(state):
        return "absent"
    text = _ip("-n", netns(state, "net"), "-o", "link", "show", node, check=False)
    if not text:
        return "absent"
    return "up" if ",UP" in text or "<UP" in text else "cut"


def pids_of(state: State, node: str) -> set[int]:
    """The host's ids of all processes in the node's network namespace, containers of its users included or not."""
    if not (NETNS_DIR / netns(state, node)).exists():
        return set()
    return {int(word) for word in _ip("netns", "pids", netns(state, node)).split()}
