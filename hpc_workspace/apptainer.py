"""Apptainer's command line, as pure functions: build an argv, build an environment.

Starts nothing. Singularity takes the same options under its own names of variables.

Source: apptainer(1), apptainer-run(1) and apptainer-exec(1) of Apptainer 1.4.5.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hpc_workspace.errors import ImageError, PrerequisiteError
from hpc_workspace.processes import find_program

Runtime = Literal["apptainer", "singularity"]
Verb = Literal["run", "exec"]

# What a container's runtime may see of the host's environment. Nothing of it reaches the container (--cleanenv).
_HOST_VARIABLES = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "TZ",
    "LD_LIBRARY_PATH",
    "XDG_RUNTIME_DIR",
)

# --compat of Apptainer 1.4 is these and --writable-tmpfs, which is left to `writable`.
_COMPAT_FLAGS = ("--containall", "--no-init", "--no-umask", "--no-eval")

_PASSPHRASE = "ENCRYPTION_PASSPHRASE"  # noqa: S105 - a variable's name; apptainer-exec(1): read where --passphrase is not given

_SIF_MAGIC = b"SIF_MAGIC"
_SIF_MAGIC_OFFSET = 32  # after the 32 bytes of the launch script; sif specification 1.0


@dataclass(frozen=True)
class Mount:
    """A path of the node, and where it appears in the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Container:
    """One container to run: image, mounts and the options that become flags."""

    image: str
    mounts: Sequence[Mount] = ()
    binds: Sequence[str] = ()
    fakeroot: bool = True
    docker_compat: bool = True
    gpu: bool = False
    no_mount: Sequence[str] = ()
    overlay: str | None = None
    writable_tmpfs: bool = False
    encryption_pem: str | None = None
    working_dir: str | None = None


def with_mount(container: Container, mount: Mount) -> Container:
    """The container with one more mount."""
    return replace(container, mounts=(*container.mounts, mount))


def without_writes(container: Container) -> Container:
    """The container as one that only looks at its image: nothing writable, nothing of the host mounted."""
    return replace(container, mounts=(), binds=(), overlay=None, writable_tmpfs=False, gpu=False, working_dir="/")


def build_container_argv(runtime: Runtime, verb: Verb, c: Container, command: Sequence[str]) -> list[str]:
    """The argv that runs `command` in `c`. No value of the environment is in it."""
    argv: list[str] = [runtime, "--quiet", verb, "--cleanenv", "--no-home"]
    if c.fakeroot:
        argv.append("--fakeroot")
    # Without --compat the PID namespace is still ours: it is what ends every process of the container at once.
    argv += _COMPAT_FLAGS if c.docker_compat else ("--pid",)
    if c.overlay is not None:
        argv += ["--overlay", c.overlay]
    if c.writable_tmpfs:
        argv.append("--writable-tmpfs")
    if c.gpu:
        argv.append("--nv")
    if c.encryption_pem is not None:
        argv += ["--pem-path", c.encryption_pem]
    # Without --containall Apptainer mounts the directory that it was started in: never that.
    for location in ["cwd", *c.no_mount]:
        argv += ["--no-mount", location]
    for mount in c.mounts:
        argv += ["--mount", format_mount(mount)]
    for bind in c.binds:
        argv += ["--bind", bind]
    if c.working_dir is not None:
        argv += ["--pwd", c.working_dir]
    return [*argv, c.image, *command]


def format_mount(mount: Mount) -> str:
    """`mount` in the syntax of --mount: comma-separated, quoted as CSV: colons and commas are safe."""
    fields = ["type=bind", f"source={mount.source}", f"destination={mount.target}"]
    if mount.read_only:
        fields.append("ro")
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()


def build_environment(
    runtime: Runtime, host: Mapping[str, str], inside: Mapping[str, str], scratch: str, own: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the runtime's own process: little of the host's, `own`, and `inside` under its prefix.

    `--env` would put the values on argv; a variable with the prefix APPTAINERENV_ reaches the container all the same
    and is readable by nobody but its owner.

    Args:
        own: variables of the runtime without its prefix, such as ENCRYPTION_PASSPHRASE.
    """
    prefix = runtime.upper()
    kept = {name: host[name] for name in _HOST_VARIABLES if name in host}
    kept[f"{prefix}_TMPDIR"] = scratch
    for name in ("CACHEDIR", "CONFIGDIR"):
        if f"{prefix}_{name}" in host:
            kept[f"{prefix}_{name}"] = host[f"{prefix}_{name}"]
    kept |= {f"{prefix}_{name}": value for name, value in own.items()}
    return kept | {f"{prefix}ENV_{name}": value for name, value in inside.items()}


def read_own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What the user's environment says to the runtime itself and must reach it on the node, without its prefix."""
    for prefix in ("APPTAINER", "SINGULARITY"):
        if f"{prefix}_{_PASSPHRASE}" in environment:
            return {_PASSPHRASE: environment[f"{prefix}_{_PASSPHRASE}"]}
    return {}


def choose_runtime(wanted: str) -> Runtime:
    """The runtime to use: the one that is wanted, or with `auto` Apptainer, else Singularity.

    Raises:
        PrerequisiteError: it is not on PATH.
    """
    names: list[Runtime] = ["apptainer", "singularity"] if wanted == "auto" else [_as_runtime(wanted)]
    for name in names:
        if find_program(name):
            return name
    raise PrerequisiteError(
        "Apptainer is not available.",
        evidence=f"Looked on PATH for: {', '.join(names)}.",
        remedy="Load its module (SlurmOptions(setup=['module load apptainer'])), or install it: "
        "https://apptainer.org/docs/user/main/quick_start.html. "
        "runtime='process' runs without a container, and is no sandbox.",
    )


def _as_runtime(name: str) -> Runtime:
    return "singularity" if name == "singularity" else "apptainer"


def require_image(path: str) -> None:
    """Make sure that `path` is a SIF file or an unpacked sandbox directory.

    Raises:
        ImageError: it is not there, can't be read, or is something else.
    """
    image = Path(path)
    if image.is_dir():
        return
    try:
        with image.open("rb") as file:
            head = file.read(_SIF_MAGIC_OFFSET + len(_SIF_MAGIC))
    except FileNotFoundError as error:
        raise ImageError(
            f"SIF file not found: {path}", remedy="Check the path; on Slurm it must be visible on the node."
        ) from error
    except OSError as error:
        raise ImageError(f"The image {path} can't be read.", evidence=str(error)) from error
    if head[_SIF_MAGIC_OFFSET:] != _SIF_MAGIC:
        raise ImageError(
            f"{path} is not a SIF file.", remedy="Make one: apptainer build image.sif docker://python:3.12"
        )


def build_convert_argv(runtime: Runtime, target: str, source: str, *, squashfs_args: str) -> list[str]:
    """The argv that makes the SIF file `target` of `source`, an image in files here: `oci:DIR`, `docker-archive:FILE`.

    Args:
        squashfs_args: for mksquashfs; empty where this runtime takes none.
    """
    more = ["--mksquashfs-args", squashfs_args] if squashfs_args else []
    return [runtime, "build", "--disable-cache", *more, target, source]


def format_squashfs_args(help_text: str, *, cpus: int, memory: str) -> str:
    """What bounds mksquashfs; empty if the `build --help` of the runtime shows that it can't pass it on.

    Source: mksquashfs(1) 4.6: without -mem its buffers are a quarter of the machine's memory, without -processors it
    uses every CPU.
    """
    return f"-processors {cpus} -mem {memory}" if "--mksquashfs-args" in help_text else ""


def build_pull_argv(runtime: Runtime, target: str, reference: str, *, arch: str) -> list[str]:
    """The argv that fetches what only the runtime knows how to fetch (library://…, https://…) to `target`."""
    return [runtime, "pull", "--disable-cache", "--arch", arch, target, reference]


def build_verify_argv(runtime: Runtime, image: str, *, key: str | None) -> list[str]:
    """The argv that checks every signature of `image`: by the keys in the user's keyring, or by the PEM file `key`.

    `--local`: no key server is asked; a compute node may have no network, and a stranger may have put a key there.
    """
    return [runtime, "verify", "--all", *(["--key", key] if key is not None else ["--local"]), image]


def unverified(image: str, said: str) -> ImageError:
    """The error of an image whose signature did not pass."""
    return ImageError(
        f"The signature of {image} did not pass.",
        evidence=said,
        remedy="Sign it (apptainer sign), import the signer's public key (apptainer key import) or name its PEM file "
        "(verify='key.pem'); verify=False runs it unchecked.",
    )


@dataclass(frozen=True)
class Cause:
    """Why a container did not start, where its runtime's log shows a known cause.

    Attributes:
        option: the option of the workspace that this machine can't grant; empty if no option is to blame.
        said: the runtime's own line.
        remedy: what to try.
    """

    option: str
    said: str
    remedy: str


def find_cause(log: str) -> Cause | None:
    """The first known cause in what the runtime printed; None if there is none.

    Only lines in which the runtime gives up count: `FATAL:` from its Go part, `ERROR  :` from its C part, and what the
    programs that it calls print, which stands by itself.
    """
    for line in log.splitlines():
        for sign, option, remedy in _CAUSES if _GIVES_UP.search(line) else ():
            if sign in line:
                return Cause(option, printable(line), remedy)
    return None


def printable(line: str) -> str:
    """`line` without the runtime's colours and other control characters."""
    return _ESCAPE.sub("", line).strip()


_GIVES_UP = re.compile(r"FATAL:|ERROR\s*:")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x1f\x7f]")
_FAKEROOT = ("use_fakeroot", "Set use_fakeroot=False, or ask for 65536 ids in /etc/subuid and /etc/subgid.")
_OVERLAY = ("writable", "Set writable='none' and write below /workspace and /tmp, or TMPDIR to another disk.")
_NO_NAMESPACES = ("", "This node allows no unprivileged user namespaces: ask its administrators.")
_KEY = ("", "Set encryption_pem to the private key (PKCS#1) or APPTAINER_ENCRYPTION_PASSPHRASE to the passphrase.")
# Messages of Apptainer 1.4.5, each made to appear on a node; the first that fits counts.
_CAUSES = (
    ("Failed to create user namespace", *_NO_NAMESPACES),
    # clone(2) gives ENOSPC where max_user_namespaces is used up: no disk is full.
    ("Failed to create container process", *_NO_NAMESPACES),
    ("newuidmap", *_FAKEROOT),
    ("newgidmap", *_FAKEROOT),
    ("could not use fakeroot", *_FAKEROOT),
    ("--fakeroot requires", *_FAKEROOT),
    ("requires 'enable overlay'", *_OVERLAY),
    ("overlay upper dir failed", *_OVERLAY),
    ("can't mount overlay filesystem", *_OVERLAY),
    ("while loading overlay images", *_OVERLAY),
    ("required option --passphrase or --pem-path missing", *_KEY),
    ("decrypt", *_KEY),
    ("Invalid encryption private key", *_KEY),
    ("failed to unlock master key", *_KEY),
    ("gocryptfs", "", "This node has no gocryptfs, which encrypted images need."),
    ("fuse: device not found", "", "This node has no /dev/fuse: ask its administrators."),
    ("failed to open /dev/fuse", "", "This node's /dev/fuse is shut to you: ask its administrators for mode 666."),
    ("open /etc/resolv.conf", "", "This node's /etc/resolv.conf is a link to nothing: ask its administrators."),
    ("no space left", "", "The node's disk is full: free some of it, or point TMPDIR at one with room."),
)
