"""What a server says of a file, as one of our errors; and what is begun anew after one."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Callable
from typing import TypeVar

from hpc_workspace.client.local import printable
from hpc_workspace.errors import FileChangedError, ServerFileError, ServerResponseError, WorkspaceError

log = logging.getLogger(__name__)

_T = TypeVar("_T")
# How often something that changes is begun, all in all.
_TRIES = 3

_BY_STATUS = {404: errno.ENOENT, 403: errno.EACCES, 507: errno.ENOSPC}
# The words of glibc and musl for errno, as programs print them with LC_ALL=C.
_BY_WORDS = {
    "No such file or directory": errno.ENOENT,
    "Permission denied": errno.EACCES,
    "Operation not permitted": errno.EPERM,
    "Read-only file system": errno.EROFS,
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "Is a directory": errno.EISDIR,
    "Not a directory": errno.ENOTDIR,
    "File name too long": errno.ENAMETOOLONG,
}
_STATUS = {errno.ENOENT: 404, errno.EACCES: 403, errno.EPERM: 403, errno.EROFS: 403, errno.ENOSPC: 507}
_STATUS |= {errno.EDQUOT: 507, errno.EFBIG: 507}
_REMEDIES = {
    404: "Relative paths begin at the workspace's working_dir.",
    403: "Choose a place that you may write to inside, such as /workspace or /tmp.",
    507: "Make room there, or choose another place: df -h inside the workspace shows what there is.",
}
_NOT_OURS = (401, 500, 502, 503)


def as_file_error(error: ServerResponseError, path: str, verb: str) -> ServerResponseError:
    """An answer that refuses a file; one that says something else of the server stays what it is.

    Args:
        verb: read or written: what was to be done with the file.
    """
    said = _detail(error.evidence)
    number = errno_in(said)
    if error.status in _NOT_OURS and not number:
        return error
    status = _STATUS.get(number, 400) if error.status in _NOT_OURS else error.status
    return server_file_error(path, verb, said, status=status, number=number or _BY_STATUS.get(status, 0))


def _detail(text: str) -> str:
    """What both servers say of an error, out of the object that they say it in."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    if not isinstance(found, dict) or "detail" not in found:
        return text
    return "\n".join(str(found[name]) for name in ("detail", "exception") if name in found)


def server_file_error(path: str, verb: str, evidence: str, *, status: int, number: int) -> ServerFileError:
    """The workspace's file system says no."""
    what = (
        "does not exist in the workspace" if status == 404 and verb == "read" else f"can't be {verb} in the workspace"
    )
    return ServerFileError(
        f"{printable(path)} {what}.",
        path=path,
        errno=number,
        status=status,
        evidence=evidence,
        remedy=_REMEDIES.get(status, "") if not (status == 403 and verb == "read") else "",
    )


def refused_by_command(path: str, verb: str, said: str) -> ServerFileError:
    """A program inside could not do it, and `said` why."""
    number = errno_in(said)
    return server_file_error(
        path, verb, printable(said.strip())[-2000:], status=_STATUS.get(number, 400), number=number
    )


def errno_in(said: str) -> int:
    """The system's number that a text speaks of; 0: none."""
    if (match := re.search(r"\[Errno (\d{1,4})\]", said)) is not None:
        return int(match[1])
    return next((number for words, number in _BY_WORDS.items() if words in said), 0)


def changed_error(path: str) -> FileChangedError:
    """It is not what it was when the reading began."""
    return FileChangedError(
        f"{printable(path)} changes in the workspace while it is read.",
        path=path,
        evidence="It was begun anew each time, and nothing of it was left here.",
        remedy="Stop what writes to it, or copy it inside first.",
    )


def until_unchanged(act: Callable[[], _T]) -> _T:
    """What `act` returns; it is begun anew, a few times, when something changes under it.

    Raises:
        FileChangedError: it changes all the time.
    """
    for _ in range(_TRIES - 1):
        try:
            return act()
        except FileChangedError as error:
            note(error)
    return act()


def note(error: WorkspaceError) -> None:
    """An error that is not the end."""
    log.info("%s", printable(error.what))
