"""Locks between processes: the only module that uses filelock. Nothing's correctness may hang on one.

Lustre may refuse to lock (ENOSYS), NFS may have no lock server (ENOLCK), and BeeGFS or `nolock` mounts say yes without
telling other nodes. So a lock here is good manners: it keeps writers from doing the same work twice, and what they do
is safe without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


def load() -> None:
    """Import filelock now, while there is time for it, and not at the first lock."""
    import filelock  # noqa: F401


@contextlib.contextmanager
def tidily(path: Path, timeout_s: float) -> Iterator[bool]:
    """Hold the lock file `path` if that is possible within `timeout_s`; go on without it if not.

    `path` is a file of its own (locking truncates it), made 0600. Yields whether the lock is held.
    """
    import filelock

    lock = filelock.FileLock(path, timeout=timeout_s, mode=0o600)
    try:
        lock.acquire()
    except (OSError, NotImplementedError, filelock.Timeout):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
