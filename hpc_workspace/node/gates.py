"""Gates: only so many containers start at once on a node, and only so many of one image.

A start reads the image and mounts it; hundreds at once make each other time out. A gate is held until the sandbox
answers: one let go at the spawn would only turn a storm into waves.

A slot is a listening socket in Linux's abstract namespace (unix(7)): one on the node however many `/tmp`s its jobs see,
given back by the kernel when its holder dies, and no file that could be left behind. Good manners only: where a
stranger sits on our names, starts go on without the gate.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import struct

log = logging.getLogger(__name__)


class Gate:
    """So many slots under one name, for this user's starts on this node.

    Args:
        name: what is gated; any text.
        slots: how many may hold it at once.
    """

    def __init__(self, name: str, slots: int) -> None:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self._addresses = [f"\0hpc-workspace-gate/{os.getuid()}/{digest}/{slot}" for slot in range(slots)]
        self._held: socket.socket | None = None
        self._is_open = False

    def __repr__(self) -> str:
        return f"<Gate [{len(self._addresses)} slots, {'held' if self.is_held else 'not held'}]>"

    @property
    def is_held(self) -> bool:
        return self._held is not None or self._is_open

    def try_acquire(self) -> bool:
        """Take a slot if one is free. Returns whether it is held now."""
        if self.is_held:
            return True
        for address in self._addresses:
            candidate = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                candidate.bind(address)
                candidate.listen(1)
            except OSError:
                candidate.close()
                if _is_a_strangers(address):
                    log.warning("another user holds the name of a start gate: going on without the gate")
                    self._is_open = True
                    return True
                continue
            self._held = candidate
            return True
        return False

    def release(self) -> None:
        """Give the slot back; nothing happens if none is held."""
        if self._held is not None:
            self._held.close()
        self._held, self._is_open = None, False


def _is_a_strangers(address: str) -> bool:
    """Whether whoever listens at `address` is another user; unix(7), SO_PEERCRED; struct ucred is three ints."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        probe.connect(address)
        _, uid, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return bool(uid != os.getuid())
    return False


def slots() -> tuple[int, int]:
    """How many starts at once: of one image, and on the node.

    A start is the CPUs' work: with 32 at once on 2 CPUs, a server that needs 0.6 s by itself took 14 s without gates
    and 1.5 s with these, and the last workspace was ready as soon (docs/benchmarks.md). One image keeps half of the
    node's slots free for others.
    """
    cpus = max(2, os.cpu_count() or 1)
    return 2 * cpus, 4 * cpus


def gates_for(image: str) -> list[Gate]:
    """The gates before a container's start, in the order in which to take them."""
    of_image, of_node = slots()
    return [Gate(f"image {image}", of_image), Gate("node", of_node)]
