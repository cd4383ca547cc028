"""What this machine gives: interpreter, settings, state directory, locks, scratch, cgroups, store, network."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from hpc_workspace import clock, files, processes, procfs
from hpc_workspace.config import config_file
from hpc_workspace.doctor.finding import Check, Verdict, fail, ok, warn
from hpc_workspace.doctor.site import Site, nearest
from hpc_workspace.errors import ConfigError, ContainerError, ImageError
from hpc_workspace.images.reference import DOCKER_HUB
from hpc_workspace.images.store import Store
from hpc_workspace.node.scratch import choose_base
from hpc_workspace.text import format_bytes
from hpc_workspace.version import __version__

_IMPORT_TIMEOUT_S = 60.0
_SLOW_IMPORT_S = 5.0
_STATE_FEWEST_BYTES, _STATE_FEW_BYTES = 10 * 10**6, 200 * 10**6
_FEW_FILES = 1000
_SCRATCH_FEWEST_BYTES, _SCRATCH_FEW_BYTES = 50 * 10**6, 2 * 10**9
_STORE_FEW_BYTES = 5 * 10**9
_TRIAL_BYTES = 1024 * 1024
_CHILD_TIMEOUT_S = 20.0
_CONNECT_TIMEOUT_S = 4.0
_SKEW_S = 2.0
# Where sites say that there is room.
_ROOMY = ("SCRATCH", "WORK", "WORKDIR", "PSCRATCH", "SCRATCHDIR", "PROJECT")
# On these, a directory can't be the upper layer of an overlay; and Unix sockets hang on some. mountinfo's names.
_SHARED_KINDS = frozenset({"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "wekafs", "panfs", "cifs",
                           "smb3", "9p", "afs", "orangefs", "fuse.glusterfs"})  # fmt: skip
_MEMORY_KINDS = frozenset({"tmpfs", "ramfs"})
# cgroup v1 says "no limit" with the largest number of pages.
_NO_LIMIT = 2**60


def look_python(site: Site) -> Verdict:
    """How long an interpreter takes until it could run a node program."""
    began_s = clock.now_s()
    argv = [sys.executable, "-c", "import hpc_workspace.node.program, hpc_workspace.server.app"]
    try:
        ended = processes.run(argv, timeout_s=_IMPORT_TIMEOUT_S)
    except processes.ProgramTimeoutError as error:
        return fail(str(error), "Put the virtual environment on a faster file system.")
    took_s = clock.now_s() - began_s
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{version}, hpc-workspace {__version__}, starts in {took_s:.1f} s"
    if ended.returncode != 0:
        return fail(
            f"{sys.executable} can't run the node program: {_last_line(ended.said)}", "Install hpc-workspace anew."
        )
    if took_s > _SLOW_IMPORT_S:
        return warn(found, "Put the virtual environment on a faster file system (or on each node's own disk).")
    return ok(found)


def look_settings(site: Site) -> Verdict:
    """Whether the configuration file and the variables are valid."""
    if (error := site.settings_error) is not None:
        return fail(" ".join(part for part in (error.what, error.evidence) if part), error.remedy)
    count = len(site.settings.origins)
    path = config_file()
    where = str(path) if path.exists() else "no file"
    return ok(f"{where}, {count} set" if count else f"{where}: all as built in")


def look_state(site: Site) -> Verdict:
    """Whether the state directory is ours alone, and files in it can be published as they are."""
    try:
        state = site.state
    except ConfigError as error:
        return fail(error.what, error.remedy)
    elsewhere = "Set HPC_WORKSPACE_HOME to a directory of yours that the nodes see."
    with contextlib.suppress(FileNotFoundError):
        found = state.lstat()
        if stat.S_ISLNK(found.st_mode):
            found = state.stat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return fail(f"{state} is not a directory of yours", elsewhere)
        mode = stat.S_IMODE(found.st_mode)
        if mode & stat.S_IWOTH:
            return fail(f"{state} can be written by everybody (mode {mode:04o})", f"chmod go-w {state}")
        if mode & stat.S_IWGRP and found.st_gid != os.getgid():
            return warn(f"{state} can be written by its group (mode {mode:04o})", f"chmod g-w {state}")
    try:
        with site.probe_dir(state) as probe:
            missing = list(_missing_operations(probe))
    except OSError as error:
        return fail(f"{state} can't be written: {error.strerror}", elsewhere)
    if missing:
        needed = [name for name in missing if name != "link"]
        said = f"{state}: {', '.join(missing)} does not work there"
        if needed:
            return fail(said, elsewhere)
        return warn(said, "Nothing: claims are made without hard links. Another file system is quicker to agree.")
    kind = _kind_of(state)
    return ok(f"{state}{'' if state.exists() else ' (to be made)'}, {kind}")


def _missing_operations(probe: Path) -> Iterator[str]:
    """The operations on files that do not do what they should in `probe`. Raises: OSError: it can't be written."""
    first, second = probe / "first", probe / "second"
    files.write_whole(first, b"1")
    files.write_whole(second, b"2")
    try:
        os.replace(first, second)
        if second.read_bytes() != b"1" or first.exists():
            yield "rename"
    except OSError:
        yield "rename"
    try:
        os.utime(second, (1, 1))
        if second.stat().st_mtime != 1:
            yield "utime"
    except OSError:
        yield "utime"
    try:
        os.link(second, first)
        if second.stat().st_nlink != 2:
            yield "link"
    except OSError:
        yield "link"


def look_state_room(site: Site) -> Verdict:
    """Whether there is room for records and logs: by the file system's word, and by writing 1 MiB."""
    try:
        place = nearest(site.state)
    except ConfigError:
        return fail("there is no state directory", "See `state directory`.")
    there = os.statvfs(place)
    free = there.f_bavail * there.f_frsize
    found = f"{format_bytes(free)} free"
    if there.f_files:  # some count none
        found += f", {there.f_favail} files"
    try:
        with site.probe_dir(place) as probe:
            files.write_whole(probe / "trial", bytes(_TRIAL_BYTES))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return fail(f"can't be written: {error.strerror}", "See `state directory`.")
        return fail(f"{error.strerror} ({found})", _MAKE_ROOM)
    if free < _STATE_FEWEST_BYTES or (there.f_files > 0 and there.f_favail < _FEW_FILES):
        return fail(found, _MAKE_ROOM)
    if free < _STATE_FEW_BYTES:
        return warn(found, _MAKE_ROOM)
    return ok(found)


_MAKE_ROOM = "Make room (`quota` may know more), or set HPC_WORKSPACE_HOME to another directory that the nodes see."
# Takes the lock of the file in argv[1] without waiting, and says what came of it.
_TRY_LOCK = """
import errno, fcntl, os, sys
try:
    fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("held")
except BlockingIOError:
    print("refused")
except OSError as error:
    print(errno.errorcode.get(error.errno, error.errno))
"""


def try_lock(path: Path) -> str:
    """What a process of its own gets that wants the lock of `path`: `held`, `refused`, or the name of an errno.

    Source: flock(2).

    Raises:
        OSError: it did not say.
    """
    try:
        ended = processes.run([sys.executable, "-c", _TRY_LOCK, str(path)], timeout_s=_CHILD_TIMEOUT_S)
    except processes.ProgramTimeoutError as error:
        raise OSError(errno.ETIMEDOUT, "a lock was waited for that was not to be waited for") from error
    if ended.returncode != 0:
        raise OSError(errno.EIO, _last_line(ended.said))
    return ended.stdout.strip()


@contextlib.contextmanager
def held_lock(path: Path) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made if need be. Raises: OSError: it can't be had."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def look_locks(site: Site) -> Verdict:
    """What two processes get that want one lock in the state directory."""
    try:
        with site.probe_dir(site.state) as probe:
            try:
                with held_lock(probe / "lock"):
                    second = try_lock(probe / "lock")
            except OSError as error:
                second = errno.errorcode.get(error.errno or 0, str(error))
    except (OSError, ConfigError) as error:
        return warn(f"not tried: {error}", "See `state directory`.")
    if second == "refused":
        return ok("a lock that one process holds is refused to another")
    if second == "held":
        return warn("two processes hold one lock at the same time", _WITHOUT_LOCKS)
    return warn(f"there are no locks ({second})", _WITHOUT_LOCKS)


_WITHOUT_LOCKS = (
    "Nothing breaks: what is right comes from renames, and locks only save work done twice. HPC_WORKSPACE_HOME on "
    "a file system with locks (Lustre: mounted with -o flock) is tidier."
)


def look_clock(site: Site) -> Verdict:
    """This machine's clock against that of the server that the state directory is on."""
    try:
        with site.probe_dir(site.state) as probe:
            before_s = clock.wall_s()
            server_s = files.server_time_s(probe)
            after_s = clock.wall_s()
    except (OSError, ConfigError) as error:
        return warn(f"not compared: {error}", "See `state directory`.")
    ahead_s = before_s - server_s if server_s < before_s else min(0.0, after_s - server_s)
    return judge_skew(ahead_s, "the file server's clock")


def judge_skew(ahead_s: float, whose: str) -> Verdict:
    """What it means that this clock is so far ahead of another one."""
    if abs(ahead_s) < _SKEW_S:
        return ok(f"{abs(ahead_s):.1f} s from {whose}")
    side = "ahead of" if ahead_s > 0 else "behind"
    return warn(
        f"{abs(ahead_s):.0f} s {side} {whose}",
        "Tell the administrators (chronyc tracking). Workspaces go by the file server's clock and work; munge, and so "
        "Slurm, refuses what is 5 minutes off.",
    )


def look_scratch(site: Site) -> Verdict:
    """Whether the node's own disk holds sockets and programs, and has room."""
    try:
        base = choose_base(os.environ)
    except ContainerError as error:
        return Verdict(site.serious(), f"{error.what} {error.evidence}", error.remedy)
    kind, free = _kind_of(base), os.statvfs(base)
    free_bytes = free.f_bavail * free.f_frsize
    found = f"{base}, {kind}, {format_bytes(free_bytes)} free"
    elsewhere = "Set TMPDIR on the node (setup = ['export TMPDIR=…']) to a directory on a disk of its own with room."
    try:
        with site.probe_dir(base) as probe:
            wrong = _try_scratch(probe)
    except OSError as error:
        return Verdict(site.serious(), f"{found}: {error.strerror or error}", elsewhere)
    if wrong or free_bytes < _SCRATCH_FEWEST_BYTES:
        return Verdict(site.serious(), f"{found}{wrong and ': '}{wrong}", elsewhere)
    if kind in _SHARED_KINDS:
        return warn(f"{found}: a shared file system, on which overlays and sockets fail", elsewhere)
    if kind in _MEMORY_KINDS:
        return warn(f"{found}: what is written there counts as the job's memory", f"{elsewhere} Or ask for more mem.")
    if free_bytes < _SCRATCH_FEW_BYTES:
        return warn(found, elsewhere)
    return ok(found)


def _try_scratch(probe: Path) -> str:
    """What scratch can't do; empty if it can do all. Raises: OSError: it can't be written."""
    files.write_whole(probe / "trial", bytes(_TRIAL_BYTES))
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(str(probe / "socket"))
        except OSError as error:
            return f"no Unix sockets there ({error.strerror or error})"
    program = probe / "program"
    files.write_whole(program, b"#!/bin/sh\n", 0o700)
    # access(2): EACCES on a file system that is mounted noexec. Running it can fail for another reason: a child
    # that another check forked while it was open for writing (ETXTBSY).
    return "" if os.access(program, os.X_OK) else "mounted noexec: no program of a workspace could run from there"


def look_cgroups(site: Site) -> Verdict:
    """Whether this process's memory has a bound that the kernel keeps."""
    version, limit_bytes = memory_limit()
    if version == 0:
        found = "no memory controller"
    else:
        bound = "no bound here" if limit_bytes is None else f"at most {format_bytes(limit_bytes)} here"
        found = f"v{version}, memory controller, {bound}"
    if site.in_job and limit_bytes is None:
        return warn(
            f"{found}, in a job",
            "Share no node (slurm.exclusive = true), or ask the administrators for TaskPlugin=task/cgroup with "
            "ConstrainRAMSpace=yes.",
        )
    return ok(found)


def memory_limit() -> tuple[int, int | None]:
    """Version of cgroups that has a memory controller (0: none), and the bound in bytes; None: there is none.

    Source: cgroups(7); Documentation/admin-guide/cgroup-v2.rst, memory.max; cgroup-v1/memory.rst.
    """
    mounts = {point: kind for point, kind in procfs.mounts_of("self") if kind in ("cgroup", "cgroup2")}
    for line in _lines_of(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            of_memory = next((Path(point) for point in mounts if "memory" in Path(point).name.split(",")), None)
            return 1, _lowest(of_memory, path, "memory.limit_in_bytes")
    for point, kind in mounts.items():
        if kind == "cgroup2" and "memory" in " ".join(_lines_of(Path(point, "cgroup.controllers"))).split():
            own = next((line.split(":", 2)[2] for line in _lines_of(Path("/proc/self/cgroup"))), "/")
            return 2, _lowest(Path(point), own, "memory.max")
    return 0, None


def _lowest(point: Path | None, path: str, name: str) -> int | None:
    """The lowest bound on the way from a cgroup to the root of what can be seen."""
    if point is None:
        return None
    own = point / path.lstrip("/")
    bounds = [
        int(text)
        for folder in (own, *own.parents)
        if folder.is_relative_to(point)
        for text in _lines_of(folder / name)
        if text.isdigit() and int(text) < _NO_LIMIT
    ]
    return min(bounds, default=None)


def look_store(site: Site) -> Verdict:
    """Whether images can be kept, and nobody else can change them."""
    store = Store(site.store)
    roomy = _roomiest(site)
    elsewhere = "Set workspace.cache_dir (HPC_WORKSPACE_CACHE) to a directory that login and compute nodes share"
    recommends = {"workspace.cache_dir": str(roomy / "hpc-workspace-images")} if roomy is not None else {}
    try:
        store.require_trusted()
    except ImageError as error:
        return fail(error.what, error.remedy)
    if site.is_node and site.has_store and not store.root.exists():
        return fail(f"{store.root} is not there on this node", f"{elsewhere}.", recommends=recommends)
    place = nearest(store.root)
    there = os.statvfs(place)
    free_bytes = there.f_bavail * there.f_frsize
    images = len(store.list_images()) if store.root.exists() else 0
    found = f"{store.root}, {images} images, {format_bytes(free_bytes)} free"
    if not site.is_node:  # nodes only read
        try:
            with site.probe_dir(place) as probe:
                files.write_whole(probe / "trial", bytes(_TRIAL_BYTES))
        except OSError as error:
            return fail(f"{store.root} can't be written: {error.strerror}", f"{elsewhere}.", recommends=recommends)
    if free_bytes < _STORE_FEW_BYTES:
        return warn(found, f"{elsewhere} and that has room; `hpc-workspace images prune` makes some.",
                    recommends=recommends)  # fmt: skip
    return ok(found)


def _roomiest(site: Site) -> Path | None:
    """The directory with the most room of those that the site names in the environment; None without one."""
    named = [Path(os.environ[name]) for name in _ROOMY if os.environ.get(name)]
    usable = [path for path in named if path.is_dir() and os.access(path, os.W_OK | os.X_OK)]
    best = max(usable, key=_free_bytes, default=None)
    return (
        best
        if best is not None and _free_bytes(best) > max(_STORE_FEW_BYTES, _free_bytes(nearest(site.store)))
        else None
    )


def _free_bytes(path: Path) -> int:
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize


def look_dns(site: Site) -> Verdict:
    """Whether a registry's name can be resolved where images are fetched."""
    host, _ = registry_address(site)
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except OSError as error:
        return offline(site, f"{host} can't be resolved ({error.strerror or error})")
    return ok(f"{host} is {found[0][4][0]}")


def look_internet(site: Site) -> Verdict | None:
    """Whether a registry, or the proxy on the way to it, accepts a connection; None if its name can't be resolved."""
    host, port = registry_address(site)
    began_s = clock.now_s()
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except socket.gaierror:
        return None  # `look_dns` says so
    except OSError as error:
        return offline(site, f"{host}:{port} can't be reached ({error.strerror or error})")
    found = f"{host}:{port} answers in {1000 * (clock.now_s() - began_s):.0f} ms"
    partition = os.environ.get("SLURM_JOB_PARTITION")
    if site.is_node and site.lacks_network and partition:
        return ok(f"{found}, and not where you are", recommends={"images.fetch_on": partition})
    return ok(found)


def offline(site: Site, found: str) -> Verdict:
    """What it means that there is no way to a registry from here: little, where images are fetched elsewhere."""
    fetch_on = site.settings.images.fetch_on
    if site.is_node:
        return ok(f"{found}; images are fetched elsewhere")
    if fetch_on is not None:
        return ok(f"{found}; images are fetched on partition {fetch_on}")
    if not site.has_slurm or site.in_job:
        return warn(found, "Fetch images where there is a network: `hpc-workspace images pull` on the login node.")
    return warn(
        found,
        "Name a partition whose nodes have a network: images.fetch_on (`hpc-workspace doctor --node PARTITION` tells); "
        "or bring SIF files.",
    )


def registry_address(site: Site) -> tuple[str, int]:
    """Host and port that a fetch connects to first: the proxy, the first registry of the settings, or Docker Hub's."""
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY") or ""
    if proxy:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        with contextlib.suppress(ValueError):
            return parts.hostname or "", parts.port or 8080
    for registry in site.settings.images.plain_http:
        host, _, port = registry.rpartition(":") if registry.rpartition(":")[2].isdigit() else (registry, "", "80")
        return host.strip("[]"), int(port)
    return f"registry-1.{DOCKER_HUB}", 443


def _kind_of(path: Path) -> str:
    """The type of the file system that `path` is on; proc(5), mountinfo: of two at one point the later counts."""
    real = nearest(path).resolve()
    best, kind = -1, "?"
    for point, found in procfs.mounts_of("self"):
        if real.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


CHECKS = (
    Check("python", "The node program and the bundled server are started with this interpreter.", look_python),
    Check("settings", "A wrong one stops every command.", look_settings),
    Check(
        "state directory",
        "Client and node find each other through it, and it holds the keys: it must be yours alone.",
        look_state,
    ),
    Check("state room", "A full disk or quota loses records and logs.", look_state_room),
    Check("locks", "They keep writers from doing work twice; nothing is lost without.", look_locks),
    Check("clock", "Ages of heartbeats and claims are told by the file server's clock.", look_clock),
    Check(
        "scratch", "The container's writable space, sockets and uploads are on the node's own disk.", look_scratch
    ),
    Check("cgroups", "Without a bound one workspace can take all of a node's memory.", look_cgroups),
    Check("image store", "Images are fetched to it once, and read from it by every node.", look_store),
    Check("dns", "The names of registries are resolved where images are fetched.", look_dns),
    Check("internet", "Images come from a registry.", look_internet),
)  # fmt: skip
