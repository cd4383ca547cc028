"""`python -m hpc_workspace.node.remover PATH...`: remove trees that hold files of this user's subordinate ids.

A process that is root in a --fakeroot container can give files to other users of the container. Outside, these belong
to subordinate ids of ours (subuid(5)) that we can't act for; inside a user namespace with the same mapping we can. A
process of its own, because unshare(2) refuses a new user namespace to one with threads.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import sys
from pathlib import Path

from hpc_workspace import processes
from hpc_workspace.errors import PrerequisiteError

_CLONE_NEWUSER = 0x10000000  # unshare(2), include/uapi/linux/sched.h
_MAP_TIMEOUT_S = 10.0


def find_range(path: Path, name: str, number: int) -> tuple[int, int] | None:
    """First id and count of the range that subuid(5) or subgid(5) gives a user, by name or number; None without one."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for fields in (line.split(":") for line in lines):
        if len(fields) == 3 and fields[0] in (name, str(number)) and fields[1].isdigit() and fields[2].isdigit():
            return int(fields[1]), int(fields[2])
    return None


def enter_user_namespace() -> None:
    """Become root of a new user namespace, mapped as Apptainer's --fakeroot does: 0 is us, 1… are our subordinate ids.

    Raises:
        OSError: the kernel, newuidmap(1) or newgidmap(1) refuses.
    """
    name = pwd.getpwuid(os.getuid()).pw_name
    ready, go = os.pipe()
    pid = os.getpid()
    mapper = os.fork()
    if mapper == 0:
        os.close(go)
        os.read(ready, 1)  # the namespace is there
        os._exit(_map_ids(pid, name))
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWUSER) failed")
    finally:
        os.close(go)
        _, status = os.waitpid(mapper, 0)
    if status != 0:
        raise OSError(0, "the ids can't be mapped")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _map_ids(pid: int, name: str) -> int:
    """From outside of the namespace of `pid`: fill in its maps. Returns an exit code."""
    for program, file, own in (("newuidmap", "/etc/subuid", os.getuid()), ("newgidmap", "/etc/subgid", os.getgid())):
        found = find_range(Path(file), name, os.getuid())
        more = ["1", *map(str, found)] if found else []
        try:
            ended = processes.run([program, str(pid), "0", str(own), "1", *more], timeout_s=_MAP_TIMEOUT_S)
        except (PrerequisiteError, processes.ProgramTimeoutError) as error:
            print(error, file=sys.stderr)
            return 1
        if ended.returncode != 0:
            print(f"{program}: {ended.said}", file=sys.stderr)
            return 1
    return 0


def main(paths: list[str]) -> int:
    """Remove the trees. Returns 0 unless the namespace can't be had; what stays is the caller's to find."""
    try:
        enter_user_namespace()
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
