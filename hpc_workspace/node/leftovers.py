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

from hpc_workspace import processes, procfs, teardown
from hpc_workspace.errors import PrerequisiteError
from hpc_workspace.node import scratch
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
    due_scratch = [path for path, owner in scratch.find_scratch(bases) if is_due(owner)]
    ended, left = teardown.end_all(
        lambda: [*kin(), *_belonging(is_due, due_scratch)], waited_for_pid=waited_for_pid, looks=looks
    )
    cleared = Cleared(ended=_described(ended), left=_described(left))
    for path in due_scratch:
        mounted = _unmount_below(path)
        # Never into a mount: what is behind it may be anybody's.
        try:
            remaining = [f"mount {point}" for point in mounted] or scratch.remove_scratch(path)
        except OSError as error:
            remaining = [f"{path} ({error.strerror})"]
        cleared.left += remaining
        if not remaining:
            cleared.removed.append(str(path))
    return cleared


def is_stale(owner: Owner | None) -> bool:
    """Whether nobody lives any more to clear away what this owner left."""
    return owner is None or owner.fate() == "dead"


def _belonging(is_due: Callable[[Owner | None], bool], due_scratch: list[Path]) -> Iterator[Process]:
    """The processes of owners that are due, by every sign there is.

    The mark in the environment, the user namespace of one that has it, a mount of the owner's scratch (the runtime
    cleans the environment of its FUSE helpers; Apptainer 1.4.5), and descent from any of these.
    """
    everybody = procfs.read_processes()
    everybody.pop(os.getpid(), None)  # `reap` itself may run inside of a workspace
    marked = _marked(is_due, everybody)
    # A container that we start has a PID namespace of its own as well; one without is a person's own shell, say.
    contained = [pid for pid in marked if procfs.is_elsewhere(pid, "user") and procfs.is_elsewhere(pid, "pid")]
    namespaces = {procfs.namespace(pid, "user") for pid in contained}
    found = {
        pid
        for pid in everybody
        if pid in marked or procfs.namespace(pid, "user") in namespaces or _mounts_any(pid, due_scratch)
    }
    kin = {child.pid for child in procfs.descendants(*found, processes=everybody)}
    yield from (everybody[pid] for pid in found | kin)


def _marked(is_due: Callable[[Owner | None], bool], everybody: dict[int, Process]) -> set[int]:
    verdicts: dict[str, bool] = {}
    marked = set()
    for pid in everybody:
        tag = procfs.environment_value(pid, TAG_NAME)
        if tag is None:
            continue
        if tag not in verdicts:
            owner = Owner.parse(tag.rpartition("/")[2])
            verdicts[tag] = owner is not None and is_due(owner)
        if verdicts[tag]:
            marked.add(pid)
    return marked


def _mounts_any(pid: int, scratch_paths: list[Path]) -> bool:
    # The names are random: one in another mount namespace than ours is a bind of that scratch.
    return procfs.is_elsewhere(pid, "mnt") and any(procfs.mounts_mention(pid, path.name) for path in scratch_paths)


def _unmount_below(path: Path) -> list[str]:
    """Take down FUSE mounts below `path`; returns those that stay."""
    for point in reversed(procfs.mounts_below(str(path))):
        for program in ("fusermount3", "fusermount"):
            try:
                if processes.run([program, "-u", "-z", point], timeout_s=_UNMOUNT_TIMEOUT_S).returncode == 0:
                    break
            except (PrerequisiteError, processes.ProgramTimeoutError) as error:
                log.debug("%s", error)
    return procfs.mounts_below(str(path))


def _described(found: list[Process]) -> list[str]:
    return [f"process {process.pid} ({process.name})" for process in found]
