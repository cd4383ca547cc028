"""What the container runtime gives here: tried with tiny images made on the spot, and read where it keeps its settings.

Source: apptainer(1), apptainer-buildcfg(1) and apptainer.conf of Apptainer 1.4.5, whose names SingularityCE 4 shares.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_workspace import apptainer, processes
from hpc_workspace.apptainer import Container, Mount, Runtime
from hpc_workspace.doctor.finding import Check, Level, Verdict, fail, ok, warn
from hpc_workspace.doctor.site import Site
from hpc_workspace.errors import ContainerError, PrerequisiteError
from hpc_workspace.node.remover import find_range
from hpc_workspace.node.scratch import choose_base

_ASK_TIMEOUT_S = 20.0
_RUN_TIMEOUT_S = 60.0
# Flags that a workspace's container is started with; the youngest came with Apptainer 1.1 and SingularityCE 3.10.
_NEEDED_FLAGS = ("--containall", "--mount", "--no-eval", "--no-init", "--no-mount", "--no-umask", "--overlay")
_FUSE_PROGRAMS = ("squashfuse", "fuse-overlayfs", "fuse2fs", "gocryptfs")
# What of the host a tiny image shows: enough for a shell.
_HOST_TREES = ("bin", "sbin", "usr", "lib", "lib32", "lib64")
_INSIDE = """
echo "ids $(cat /proc/self/uid_map | tr -s ' \\n' ' ')"
while read -r source point kind rest; do [ "$point" = / ] && root=$kind; done < /proc/self/mounts
echo "root $root"
if (echo written > /written) 2>/dev/null; then echo "wrote $(cat /written)"; fi
"""
# As the option disable_mount_locations has it.
_NO_MOUNT = ("hostfs", "bind-paths")
# Types of file systems, as mounts name them.
_OVERLAYS = {"overlay": "the kernel's", "fuse.fuse-overlayfs": "fuse-overlayfs"}
_SMALL_SESSION_MB = 64
_FEWEST_IDS = 65536
_SYSCTLS = {
    "kernel/unprivileged_userns_clone": "0",
    "user/max_user_namespaces": "0",
    "kernel/apparmor_restrict_unprivileged_userns": "1",
}


@dataclass(frozen=True)
class Inside:
    """What a container said of itself.

    Attributes:
        id_counts: how many ids each line of its uid_map maps.
        root_kind: the type of the file system at its root.
        can_write: whether its root can be written.
    """

    id_counts: tuple[int, ...]
    root_kind: str
    can_write: bool


def look_runtime(site: Site) -> Verdict:
    """Which runtime there is, and whether it knows the flags that workspaces start it with."""
    try:
        runtime = _runtime(site)
    except PrerequisiteError as error:
        return _missing_runtime(site, error)
    version = _ask([runtime, "--version"]).stdout.strip()
    help_text = _ask([runtime, "run", "--help"]).stdout
    path = processes.find_program(runtime)
    if missing := [flag for flag in _NEEDED_FLAGS if flag not in help_text]:
        return Verdict(
            site.serious(), f"{version} has no {', '.join(missing)}", "Install Apptainer 1.1 or later (module avail?)."
        )
    return ok(f"{version or runtime}, {path}")


def _missing_runtime(site: Site, error: PrerequisiteError) -> Verdict:
    """There is none on PATH: perhaps a module has one."""
    names = ("apptainer", "singularity")
    load = next((name for name in names if _module_has(name)), None)
    found = f"none on PATH ({error.evidence.rstrip('.')})"
    if load is not None:
        line = f"module load {load}"
        return Verdict(
            site.serious(),
            f"none on PATH; `{line}` brings it",
            f'Set slurm.setup = ["{line}"].',
            {"slurm.setup": [line]},
        )
    if not site.runs_containers:
        return warn(
            found,
            "Nodes need it (`hpc-workspace doctor --node`); here it only converts images: load its module, or name a "
            "partition that fetches them (images.fetch_on).",
        )
    return fail(found, error.remedy)


def _module_has(name: str) -> bool:
    """Whether a login shell's `module load` brings the program; Environment Modules and Lmod alike."""
    argv = ["bash", "-lc", f"module load {name} >/dev/null 2>&1 && command -v {name}"]
    with contextlib.suppress(PrerequisiteError, processes.ProgramTimeoutError):
        return processes.run(argv, timeout_s=_ASK_TIMEOUT_S).returncode == 0
    return False


def look_mode(site: Site) -> Verdict | None:
    """Whether the runtime has privileges of its own, or lives on user namespaces."""
    if (mode := _mode(site)) is None:
        return None
    if mode == "set-uid":
        return ok("set-uid root: needs no user namespaces")
    return ok("unprivileged: lives on user namespaces")


def _mode(site: Site) -> str | None:
    """`set-uid` or `unprivileged`; None without a runtime."""
    try:
        runtime = _runtime(site)
    except PrerequisiteError:
        return None
    starter = Path(_buildcfg(site).get("LIBEXECDIR", ""), runtime, "bin", "starter-suid")
    with contextlib.suppress(OSError):
        found = starter.stat()
        if found.st_uid == 0 and found.st_mode & stat.S_ISUID and _conf(site).get("allow setuid", "yes") == "yes":
            return "set-uid"
    return "unprivileged"


def look_user_namespaces(site: Site) -> Verdict:
    """Whether this user can make a user namespace and mount something in it."""
    ended = _ask([sys.executable, "-m", "hpc_workspace.doctor.namespaces"])
    if ended.returncode == 0:
        return ok("can be made and used")
    reasons = [
        f"{name.replace('/', '.')} = {value}"
        for name, value in _SYSCTLS.items()
        if _text_of(Path("/proc/sys", name)).strip() == value
    ]
    found = f"refused ({ended.said.splitlines()[-1] if ended.said else 'no word'})"
    remedy = "Ask the administrators for user.max_user_namespaces > 0 (kernel.unprivileged_userns_clone = 1; with "
    remedy += "AppArmor a profile for the runtime), or for a set-uid Apptainer."
    if reasons:
        found += f": {', '.join(reasons)}"
    if _mode(site) == "set-uid":
        return warn(
            f"{found}; the runtime is set-uid", "Set use_fakeroot=False: fakeroot needs them, containers do not."
        )
    return Verdict(site.serious(), found, remedy)


def look_container(site: Site) -> Verdict | None:
    """Whether a container of a directory runs."""
    return _look_inside(site, Container("", fakeroot=False), lambda inside: ok("a directory runs"))


def look_sif(site: Site) -> Verdict | None:
    """Whether a directory can be made a SIF file, as a fetched image is, and runs."""
    container = Container("", fakeroot=False)
    return _look_inside(site, container, lambda inside: ok("made of a directory, and runs"), as_sif=True)


def look_fakeroot(site: Site) -> Verdict | None:
    """What root is in a container with --fakeroot."""

    def judge(inside: Inside) -> Verdict:
        count = sum(inside.id_counts)
        return ok(f"root inside, with {count} id{'s' if count > 1 else ''}")

    return _look_inside(site, Container("", fakeroot=True), judge, weakest="warn", without="Set use_fakeroot=False.")


def look_subordinate_ids(site: Site) -> Verdict:
    """The lines of this user in /etc/subuid and /etc/subgid, and whether newuidmap(1) maps by them."""
    name = pwd.getpwuid(os.getuid()).pw_name
    ranges = {file: find_range(Path(file), name, os.getuid()) for file in ("/etc/subuid", "/etc/subgid")}
    ask = f"Ask the administrators: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
    missing = [file for file, found in ranges.items() if found is None]
    if missing:
        return warn(f"no line for {name} in {' and '.join(missing)}: root inside is the only user", ask)
    few = [f"{found[1]} in {file}" for file, found in ranges.items() if found is not None and found[1] < _FEWEST_IDS]
    if few:
        return warn(f"only {', '.join(few)}", ask)
    ended = _ask([sys.executable, "-m", "hpc_workspace.node.remover"])  # enters the namespace, and removes nothing
    if ended.returncode != 0:
        return warn(
            f"there are lines, but they can't be used: {ended.said.splitlines()[-1] if ended.said else 'no word'}",
            "Ask for newuidmap and newgidmap (package uidmap or shadow-utils), set-uid root.",
        )
    return ok(f"{_FEWEST_IDS} ids each, mapped by newuidmap")


def look_overlay(site: Site) -> Verdict | None:
    """Whether a directory of the scratch can be the container's writable layer, and what kind of overlay that is."""

    def judge(inside: Inside) -> Verdict:
        if not inside.can_write:
            return warn("the root can't be written", _WEAKER)
        return ok(f"{_OVERLAYS.get(inside.root_kind, inside.root_kind)}, writable")

    container = Container("", fakeroot=False, overlay="overlay")
    return _look_inside(site, container, judge, weakest="warn", without=_WEAKER)


_WEAKER = "Set writable='tmpfs' (in memory) or 'none'; without it a workspace finds that out at each start."


def look_fuse_programs(site: Site) -> Verdict | None:
    """Which FUSE helpers there are, on PATH or where the runtime has its own."""
    try:
        runtime = _runtime(site)
    except PrerequisiteError:
        return None
    own = Path(_buildcfg(site).get("LIBEXECDIR", "/nowhere"), runtime, "bin")
    there: list[str] = []
    missing: list[str] = []
    for name in _FUSE_PROGRAMS:
        names = (name, f"{name}_ll")
        found = any(processes.find_program(n, of_system=True) or os.access(own / n, os.X_OK) for n in names)
        (there if found else missing).append(name)
    if not missing:
        return ok(", ".join(there))
    found_text = f"no {', '.join(missing)}" + (f"; {', '.join(there)}" if there else "")
    if missing == ["gocryptfs"]:
        return ok(f"{found_text} (for encrypted images only)")
    if _mode(site) == "set-uid" and "fuse-overlayfs" in there:
        return ok(f"{found_text}; set-uid: the kernel mounts images")
    return warn(
        found_text,
        "Ask for squashfuse (without it each start unpacks the image), fuse-overlayfs (where the kernel's overlay is "
        "not allowed) and fuse2fs (overlay images).",
    )


def look_dev_fuse(site: Site) -> Verdict | None:
    """Whether /dev/fuse opens."""
    if (mode := _mode(site)) is None:
        return None
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        found = f"/dev/fuse: {error.strerror}"
        if mode == "set-uid":
            return ok(f"{found}; set-uid: the kernel mounts images")
        # With squashfuse there, Apptainer 1.4.5 gives up; without, it unpacks the image at each start.
        level = site.serious() if processes.find_program("squashfuse_ll", of_system=True) else "warn"
        return Verdict(level, found, "Ask the administrators: modprobe fuse; chmod 666 /dev/fuse.")
    return ok("opens")


def look_session_directory(site: Site) -> Verdict | None:
    """How much a container may write with writable='tmpfs'."""
    try:
        _runtime(site)
    except PrerequisiteError:
        return None
    said = _conf(site).get("sessiondir max size", "")
    if not said.isdigit():
        return warn("its size is not in the runtime's configuration", "Nothing, unless you set writable='tmpfs'.")
    found = f"{said} MiB"
    if int(said) < _SMALL_SESSION_MB:
        return warn(found, "Keep writable='overlay'; or ask for a larger `sessiondir max size` in apptainer.conf.")
    return ok(f"{found}, for writable='tmpfs' only")


def _look_inside(
    site: Site,
    container: Container,
    judge: Callable[[Inside], Verdict],
    *,
    as_sif: bool = False,
    weakest: Level = "fail",
    without: str = "",
) -> Verdict | None:
    """What `judge` says of a container that runs; a failure with the runtime's own words if it does not.

    Args:
        container: its image and overlay are made here.
        weakest: what a failure is where workspaces run.
        without: how to do without; empty where that can't be.
    """
    try:
        runtime = _runtime(site)
    except PrerequisiteError:
        return None
    try:
        with site.probe_dir(choose_base(os.environ)) as probe:
            ended = _run_tiny(site, runtime, container, probe, as_sif=as_sif)
    except (OSError, ContainerError) as error:
        return warn(f"not tried: {error}", "See `scratch`.")
    except processes.ProgramTimeoutError as error:
        return Verdict(site.serious(weakest), str(error), "Look at what the machine is busy with; try again.")
    if ended.returncode != 0:
        cause = apptainer.find_cause(ended.stderr)
        said = cause.said if cause else _fatal_line(ended.said)
        remedy = cause.remedy if cause else without or f"Try it by hand: {runtime} exec DIRECTORY true"
        return Verdict(site.serious(weakest), said or f"exit code {ended.returncode}", remedy)
    if (inside := _parse_inside(ended.stdout)) is None:
        return warn(f"it ran, and said {ended.stdout[:80]!r}", f"Try it by hand: {runtime} exec DIRECTORY true")
    unpacks = "to temporary sandbox" in ended.stderr
    if unpacks and as_sif:
        return warn(
            "runs, but is unpacked at each start",
            "Ask for squashfuse and /dev/fuse (see there): a start is slow without.",
        )
    return judge(inside)


def _run_tiny(site: Site, runtime: Runtime, container: Container, probe: Path, *, as_sif: bool) -> processes.Completed:
    """Run a tiny image as a workspace's container is run. Raises: OSError, ProgramTimeoutError."""
    image, mounts = _make_image(probe)
    scratch = probe / "tmp"
    scratch.mkdir()
    environment = apptainer.build_environment(runtime, os.environ, {}, str(scratch), {})
    environment[f"{runtime.upper()}_CACHEDIR"] = str(probe / "cache")
    if as_sif:
        argv = apptainer.build_convert_argv(runtime, "image.sif", str(image), squashfs_args="")
        made = processes.run(argv, timeout_s=_RUN_TIMEOUT_S, env=environment, cwd=str(probe))
        if made.returncode != 0:
            return made
        image = probe / "image.sif"
    if container.overlay is not None:
        (probe / container.overlay).mkdir()
        container = replace(container, overlay=str(probe / container.overlay))
    container = replace(container, image=str(image), mounts=mounts, no_mount=_NO_MOUNT, working_dir="/")
    argv = apptainer.build_container_argv(runtime, "exec", container, ["/bin/sh", "-c", _INSIDE])
    # Not --quiet: that a SIF file is unpacked is said as INFO.
    argv.remove("--quiet")
    return processes.run(argv, timeout_s=_RUN_TIMEOUT_S, env=environment, cwd=str(probe))


def _make_image(probe: Path) -> tuple[Path, Sequence[Mount]]:
    """A sandbox directory with nothing in it but places for the host's own programs, and the mounts that fill them."""
    root = probe / "image"
    for name in ("dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "var/tmp"):
        (root / name).mkdir(parents=True)
    for name in ("passwd", "group", "resolv.conf", "hosts", "localtime"):
        (root / "etc" / name).touch()
    mounts = []
    for name in _HOST_TREES:
        on_host = Path("/", name)
        if on_host.is_symlink():
            (root / name).symlink_to(os.readlink(on_host))
        elif on_host.is_dir():
            (root / name).mkdir()
            mounts.append(Mount(str(on_host), str(on_host), read_only=True))
    return root, mounts


def _parse_inside(text: str) -> Inside | None:
    """What the container printed; None if that is something else."""
    lines = dict(line.partition(" ")[::2] for line in text.splitlines())
    if "root" not in lines or "ids" not in lines:
        return None
    numbers = [int(word) for word in lines["ids"].split() if word.isdigit()]
    return Inside(tuple(numbers[2::3]), lines["root"], lines.get("wrote") == "written")


def _fatal_line(said: str) -> str:
    """The first line in which a program gives up, else its last."""
    lines = [apptainer.printable(line) for line in said.splitlines() if line.strip()]
    return next((line for line in lines if re.match(r"FATAL|ERROR", line)), lines[-1] if lines else "")


def _runtime(site: Site) -> Runtime:
    """The runtime that the settings want. Raises: PrerequisiteError: it is not there."""
    return site.once("runtime", lambda: apptainer.choose_runtime(site.settings.workspace.runtime or "auto"))


def _buildcfg(site: Site) -> Mapping[str, str]:
    """Where the runtime has its parts, by the names of `apptainer buildcfg`."""

    def ask() -> dict[str, str]:
        lines = _ask([_runtime(site), "buildcfg"]).stdout.splitlines()
        return dict(line.strip().partition("=")[::2] for line in lines if "=" in line)

    return site.once("buildcfg", ask)


def _conf(site: Site) -> Mapping[str, str]:
    """The runtime's configuration file, as far as this user may read it."""

    def read() -> dict[str, str]:
        runtime, places = _runtime(site), _buildcfg(site)
        file = places.get(f"{runtime.upper()}_CONF_FILE") or f"/etc/{runtime}/{runtime}.conf"
        lines = (line.strip() for line in _text_of(Path(file)).splitlines())
        pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
        return {key.strip(): value.strip() for key, _, value in pairs}

    return site.once("conf", read)


def _ask(argv: Sequence[str]) -> processes.Completed:
    return processes.run(argv, timeout_s=_ASK_TIMEOUT_S)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


CHECKS = (
    Check("runtime", "Workspaces run in Apptainer or Singularity.", look_runtime),
    Check("runtime mode", "It decides what the kernel must allow.", look_mode),
    Check("user namespaces", "An unprivileged runtime makes every container with one.", look_user_namespaces),
    Check("container", "A container is what a workspace is.", look_container),
    Check("sif", "Images are converted to SIF files, and mounted from them.", look_sif),
    Check("fakeroot", "use_fakeroot makes you root inside, so that packages can be installed.", look_fakeroot),
    Check("subordinate ids", "Fakeroot maps other users of the image to them.", look_subordinate_ids),
    Check("overlay", "writable='overlay' keeps what is written outside /workspace and /tmp.", look_overlay),
    Check("fuse programs", "Without set-uid, images and overlays are mounted by them.", look_fuse_programs),
    Check("/dev/fuse", "FUSE programs need it.", look_dev_fuse),
    Check("session directory", "It bounds writable='tmpfs'.", look_session_directory),
)
