"""Whose is it? The mark that all of a workspace on a node carries, so that leftovers can be told from the living.

A process id alone may be given to another process one day, and a directory may be seen from more than one machine or
process namespace. So the mark says all of it, and where it can't be judged from here, the answer is "unknown".
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_workspace import procfs

Fate = Literal["alive", "dead", "unknown"]


_NUMBER = re.compile(r"[0-9]{1,20}")


@dataclass(frozen=True)
class Owner:
    """One process, named for ever.

    Attributes:
        node: the machine's short host name, and a digest of its id (machine-id(5)): two clusters may share a name.
        boot_id: random, of the machine's last boot (/proc/sys/kernel/random/boot_id, random(4)).
        pid_namespace: as /proc/self/ns/pid names it; ids mean nothing in another one.
        start_ticks: clock ticks between boot and the process's start (proc(5), stat field 22).
    """

    node: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"{self.node} {self.boot_id} {self.pid_namespace} {self.pid} {self.start_ticks}"

    @classmethod
    def of(cls, pid: int) -> Owner:
        """The mark of a process of this machine.

        Raises:
            ProcessLookupError: there is none with this id.
        """
        process = procfs.read_process(pid)
        if process is None:
            raise ProcessLookupError(f"no process {pid}")
        node, boot_id, namespace = _here()
        return cls(node, boot_id, namespace, pid, process.start_ticks)

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The mark written as `text`; None if it is none."""
        fields = text.split()
        if len(fields) != 5 or not all(_NUMBER.fullmatch(field) for field in fields[3:]):
            return None
        return cls(fields[0], fields[1], fields[2], int(fields[3]), int(fields[4]))

    def fate(self) -> Fate:
        """Whether the process still runs, as far as it can be told from here."""
        node, boot_id, namespace = _here()
        if self.node != node:
            return "unknown"
        if self.boot_id != boot_id:
            return "dead"
        if self.pid_namespace != namespace:
            return "unknown"
        process = procfs.read_process(self.pid)
        if process is None or process.is_zombie or process.start_ticks != self.start_ticks:
            return "dead"
        return "alive"


def _here() -> tuple[str, str, str]:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        machine_id = hashlib.sha256(Path("/etc/machine-id").read_bytes()).hexdigest()[:8]
    except OSError:
        machine_id = "-"
    return f"{socket.gethostname().partition('.')[0]}+{machine_id}", boot_id, os.readlink("/proc/self/ns/pid")
