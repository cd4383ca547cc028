"""`python -m hpc_workspace.doctor.namespaces`: make a user namespace and use it, as an unprivileged container does.

A process of its own, because unshare(2) refuses a new user namespace to one with threads, and there is no way back.
Exits 0 if all of it works; else it says on stderr what does not.

Source: unshare(2), user_namespaces(7), mount(2).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # include/uapi/linux/sched.h


def main() -> int:
    """Become root of a new user namespace and mount something in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
        return _failed("unshare", ctypes.get_errno())
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as error:
        return _failed("uid_map", error.errno or 0)
    # Where AppArmor restricts them (Ubuntu 23.10 and later), a namespace can be made, and nothing can be done in it.
    # Nobody else sees this mount: what is in a new user namespace's mount namespace does not spread.
    if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) != 0:
        return _failed("mount", ctypes.get_errno())
    return 0


def _failed(what: str, number: int) -> int:
    print(f"{what}: {os.strerror(number)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
