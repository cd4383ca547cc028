"""Files on a disk that others write to at the same time: written whole, and dated by the file server's clock."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` at `path`: aside, flushed to the server, then renamed over what was there.

    Args:
        mode: the file's, whatever the umask.

    Guarantees: a reader sees all of it or nothing.

    Raises:
        OSError: it can't be written; nothing has changed.
    """
    aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Have the server keep what is in the file `path`. Raises: OSError: it can't."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def age_s(path: Path) -> float:
    """Seconds since `path` was last touched; below zero if that is yet to come.

    A probe is made beside it for "now", since the clocks of nodes differ.

    Raises:
        OSError: it is gone, or its directory can't be written.
    """
    touched = path.stat().st_mtime
    return server_time_s(path.parent) - touched


def server_time_s(folder: Path) -> float:
    """What time it is by the clock of the server that `folder` is on.

    Raises:
        OSError: the directory can't be written.
    """
    probe = folder / f".now-{secrets.token_hex(6)}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
