"""Clearing away what workspaces have on this node: processes, mounts and scratch directories, with proof.

One way for all who need it: a node program at its end, its warden when it was killed, the next start for what died
unseen, and `hpc-workspace reap`. They differ in whose things are due.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpc_workspace import processes, procfs
from hpc_workspace.errors import PrerequisiteError
from hpc_workspace.node import scratch, teardown
from hpc_workspace.owner import Owner
from hpc_workspace.procfs import Process

log = logging.getLogger(__name__)

TAG_NAME = "HPC_WORKSPACE_SESSION"
_UNMOUNT_TIMEOUT_S = 10.0


def tag_value(workspace_id: str, launch_id: str, owner: Owner) -> str:
    """What the environment variable `TAG_NAME` says in every process of a workspace."""
    return f"{workspace_id}/{launch_id}/{owner}"


@dataclass
class Cleared:
    """What was cleared away, and what could not be: a line of text each. An empty `left` is the proof."""

    ended: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def clear(
    is_due: Callable[[Owner | None], bool],
    bases: list[Path],
    *,
    kin: Callable[[], list[Process]] = list,
    waited_for_pid: int = 0,
    looks: int = 2,
) -> Cleared:
    """End the processes and remove the scratch of every owner that is due; see `teardown.end_all` for the proof.

    Args:
        is_due: of an owner, or of None for a scratch directory whose maker died before it could mark it.
        bases: where scratch may be.
        kin: further processes to end, looked for anew each time.
        waited_for_pid: a child that somebody else here waits for.
        looks: how many in a row must find nobody; one is enough for what died long ago.
    """
    ended, left = teardown.end_all(lambda: [*kin(), *_tagged(is_due)], waited_for_pid=waited_for_pid, looks=looks)
    cleared = Cleared(ended=_described(ended), left=_described(left))
    for path, owner in list(scratch.find_scratch(bases)):
        if not is_due(owner):
            continue
        mounted = _unmount_below(path)
        # Never into a mount: what is behind it may be anybody's.
        remaining = [f"mount {point}" for point in mounted] or scratch.remove_tree(path)
        cleared.left += remaining
        if not remaining:
            cleared.removed.append(str(path))
    return cleared


def is_stale(owner: Owner | None) -> bool:
    """Whether nobody lives any more to clear away what this owner left."""
    return owner is None or owner.fate() == "dead"


def _tagged(is_due: Callable[[Owner | None], bool]) -> Iterator[Process]:
    """The processes that carry a mark that is due, and their descendants."""
    everybody = procfs.read_processes()
    verdicts: dict[str, bool] = {}
    del everybody[os.getpid()]  # `reap` itself may run inside of a workspace
    for process in everybody.values():
        tag = procfs.environment_value(process.pid, TAG_NAME)
        if tag is None:
            continue
        if tag not in verdicts:
            owner = Owner.parse(tag.rpartition("/")[2])
            verdicts[tag] = owner is not None and is_due(owner)
        if verdicts[tag]:
            yield process
            yield from procfs.descendants(process.pid, everybody)


def _unmount_below(path: Path) -> list[str]:
    """Take down FUSE mounts below `path`; returns those that stay."""
    for point in reversed(procfs.mounts_below(str(path))):
        for program in ("fusermount3", "fusermount"):
            try:
                processes.run([program, "-u", "-z", point], timeout_s=_UNMOUNT_TIMEOUT_S)
            except (PrerequisiteError, processes.ProgramTimeoutError) as error:
                log.debug("%s", error)
            else:
                break
    return procfs.mounts_below(str(path))


def _described(found: list[Process]) -> list[str]:
    return [f"process {process.pid} ({process.name})" for process in found]
