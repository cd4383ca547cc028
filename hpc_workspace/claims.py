"""Claims: who does a piece of work that many might do at once, on file systems where locks fail or lie.

A claim is a file `<name>.<n>` in a directory, made whole by link(2), which is atomic on NFS and Lustre too. Of several,
the highest n counts. Its holder touches it while it works. One whose holder is dead, or has not touched it for a
minute by the file server's clock, is followed by n + 1, which only one can make.

A holder that was only slow may find that it has a successor: so what is done under a claim must be safe when two do it
at once (made aside, published by rename). The claim saves work; it does not protect.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hpc_workspace import clock, files
from hpc_workspace.owner import Owner

_BEAT_S = 5.0
_STALE_S = 60.0
_LOOK_S = (0.02, 1.0)
# Some FUSE and network file systems have no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_Value = TypeVar("_Value")


def once(
    folder: Path,
    name: str,
    *,
    find: Callable[[], _Value | None],
    make: Callable[[], _Value],
    on_wait: Callable[[str], None],
    timeout_s: float | None = None,
) -> _Value:
    """What `find` finds, or else what `make` makes, while all others who ask for `name` wait for it.

    If the one who makes it fails, the next of those who wait tries; each failure is its own caller's.

    Args:
        find: looks whether it is there; None if not. It is asked again after every wait.
        on_wait: told once, and in words, who is waited for.
        timeout_s: how long to wait for others; None: for ever.

    Raises:
        TimeoutError: others held the claim all the time.
        OSError: the directory can't be written.
        Whatever `find` and `make` raise.
    """
    deadline = clock.Deadline(timeout_s)
    told = False
    for pause_s in clock.pauses_s(*_LOOK_S):
        if (value := find()) is not None:
            return value
        if (claim := take(folder, name)) is not None:
            with contextlib.closing(claim):
                # The one before us may have finished between our look and our claim.
                return value if (value := find()) is not None else make()
        if deadline.is_over:
            raise TimeoutError(f"{_holder(folder, name)} did not finish it in {deadline.elapsed_s:.0f} s")
        if not told:
            told = True
            on_wait(_holder(folder, name))
        clock.sleep(min(pause_s, deadline.left_s))
    raise AssertionError("pauses never end")


class Claim:
    """A claim that is held, and touched by a thread until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim {path.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let it go."""
        self._ended.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            # Gone, or a full or absent file server: whoever waits will take it for stale, which it then is.
            with contextlib.suppress(OSError):
                os.utime(self.path)


def take(folder: Path, name: str) -> Claim | None:
    """Claim `name`; None if somebody else has it.

    Raises:
        OSError: the directory can't be written.
    """
    older = _generations(folder, name)
    newest = max(older, default=0)
    if newest and not _is_abandoned(folder / f"{name}.{newest}"):
        return None
    path = folder / f"{name}.{newest + 1}"
    if not _create(path, f"{Owner.of(os.getpid())}\n{os.uname().nodename}\n"):
        return None
    if max(_generations(folder, name), default=0) > newest + 1:  # an old listing, of a cache: others are further
        path.unlink(missing_ok=True)
        return None
    for number in older:
        (folder / f"{name}.{number}").unlink(missing_ok=True)
    return Claim(path)


def is_held(folder: Path, name: str) -> bool:
    """Whether somebody works on `name` now."""
    newest = max(_generations(folder, name), default=0)
    return newest > 0 and not _is_abandoned(folder / f"{name}.{newest}")


def names(folder: Path) -> set[str]:
    """The names of all claims that are in a directory, held or abandoned."""
    try:
        return {entry.rpartition(".")[0] for entry in os.listdir(folder) if not entry.startswith(".")}
    except FileNotFoundError:
        return set()


def remove_abandoned(folder: Path) -> int:
    """Remove what dead holders left. Returns how many files that were."""
    removed = 0
    for name in names(folder):
        for number in _generations(folder, name):
            path = folder / f"{name}.{number}"
            if _is_abandoned(path):
                path.unlink(missing_ok=True)
                removed += 1
    return removed


def _generations(folder: Path, name: str) -> list[int]:
    # Listed, not looked up: NFS remembers for a while that a file was not there.
    prefix = f"{name}."
    tails = (entry.removeprefix(prefix) for entry in os.listdir(folder) if entry.startswith(prefix))
    return [int(tail) for tail in tails if tail.isdigit()]


def _create(path: Path, text: str) -> bool:
    """Make the file `path` with its text, whole; False if it is there already."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        aside.write_text(text)
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_exclusively(path, text)
    finally:
        aside.unlink(missing_ok=True)
    return True


def _create_exclusively(path: Path, text: str) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    return True


def is_gone(marker: Path, stale_s: float) -> bool:
    """Whether the process whose mark (`owner.Owner`) is the first line of a file is dead, or must be: nobody here can
    tell, and the file was not touched for `stale_s`.

    Raises:
        OSError: the file is gone, or can't be judged.
    """
    owner = Owner.parse(marker.read_text(errors="replace").partition("\n")[0])
    fate = owner.fate() if owner is not None else "unknown"
    return fate == "dead" or (fate == "unknown" and files.age_s(marker) > stale_s)


def _is_abandoned(path: Path) -> bool:
    """Whether the claim's holder is dead, or silent for so long that it must be."""
    try:
        return is_gone(path, _STALE_S)
    except FileNotFoundError:
        return False  # let go in this moment: the next look decides


def _holder(folder: Path, name: str) -> str:
    newest = max(_generations(folder, name), default=0)
    try:
        owner, node = (folder / f"{name}.{newest}").read_text(errors="replace").splitlines()[:2]
        return f"process {owner.split()[3]} on {node}"
    except (OSError, ValueError, IndexError):
        return "another process"
