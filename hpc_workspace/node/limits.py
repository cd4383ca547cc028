"""A bound on a container's processes, so that a fork bomb in it stays in it."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Callable

from hpc_workspace import procfs
from hpc_workspace.errors import ContainerError

_COUNTS_BY_NAMESPACE_SINCE = (5, 14)  # Linux; kernel/ucount.c


def limit_processes(find: Callable[[], list[procfs.Process]], count: int) -> None:
    """Let the user namespace of a container have at most `count` processes and threads, the server's own among them.

    Set on the processes that run (prlimit(2)), and inherited by all that they start. Inside a user namespace the kernel
    counts a user's processes of that namespace alone (since Linux 5.14); without one it would count all of this user's
    on the node, so that is refused.

    Args:
        find: the container's processes; asked again until all of them have the bound.

    Raises:
        ContainerError: there is no user namespace of its own, or the bound can't be set.
    """
    release = os.uname().release
    if tuple(int(number) for number in re.findall(r"\d+", release)[:2]) < _COUNTS_BY_NAMESPACE_SINCE:
        raise ContainerError(
            f"max_processes can't be kept here: Linux {release} would count all of your processes on this node.",
            remedy="Leave max_processes out.",
        )
    bounded: set[int] = set()
    while todo := [process for process in find() if process.pid not in bounded]:
        for process in todo:
            if not procfs.is_elsewhere(process.pid, "user"):
                raise ContainerError(
                    "max_processes can't be kept here: the container has no user namespace of its own.",
                    remedy="Leave max_processes out, or use_fakeroot=True.",
                )
            bounded.add(process.pid)
            with contextlib.suppress(ProcessLookupError):
                try:
                    resource.prlimit(process.pid, resource.RLIMIT_NPROC, (count, count))
                except OSError as error:
                    if isinstance(error, ProcessLookupError):
                        raise
                    raise ContainerError(
                        f"max_processes={count} can't be set on the container.", evidence=str(error)
                    ) from error
