"""`python -m hpc_workspace.images.keeper --cpus N -- PROGRAM ARGS…`: runs a program that must not hurt its neighbours.

Nice, on N CPUs at most, and ended with all that it started when this process is told to end, or when the one that
started it is gone: its stdin is a pipe that nobody writes to. A login node is shared, and a conversion may take hours.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from hpc_workspace import processes, procfs, teardown

_NICE = 10
_GRACE_S = 2.0


def main(argv: Sequence[str]) -> int:
    """Run the program to its end. Returns its exit code (128 + N: it was ended by signal N)."""
    cpus, command = int(argv[1]), list(argv[3:])
    teardown.become_subreaper()
    os.nice(_NICE)
    keep_to_cpus(cpus)
    child = processes.spawn(command, output=2, env=None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _end(child.pid))
    threading.Thread(target=_end_with_parent, args=(child.pid,), daemon=True).start()
    code = None
    while code is None:
        code = child.wait(3600)
    teardown.end_all(lambda: procfs.descendants(os.getpid()))
    return code if code >= 0 else 128 - code


def keep_to_cpus(count: int) -> None:
    """Use at most `count` of the CPUs that this process may use; which of them is left to chance."""
    allowed = sorted(os.sched_getaffinity(0))
    if count < len(allowed):
        os.sched_setaffinity(0, random.sample(allowed, count))


def _end_with_parent(child: int) -> None:
    os.read(0, 1)
    _end(child)


def _end(child: int) -> NoReturn:
    """End the program and all that it started, and this process too."""
    teardown.terminate(child, grace_s=_GRACE_S)
    teardown.end_all(lambda: procfs.descendants(os.getpid()), waited_for_pid=child)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
