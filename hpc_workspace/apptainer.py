"""Apptainer's command line, as pure functions: build an argv, build an environment.

Starts nothing. Singularity takes the same options under its own names of variables.

Source: apptainer(1), apptainer-run(1) and apptainer-exec(1) of Apptainer 1.4.5.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpc_workspace.errors import ImageError, PrerequisiteError
from hpc_workspace.processes import find_program

Runtime = Literal["apptainer", "singularity"]

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
    working_dir: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def build_container_argv(
    runtime: Runtime, verb: Literal["run", "exec"], c: Container, command: Sequence[str]
) -> list[str]:
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
    for location in c.no_mount:
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
    runtime: Runtime, host: Mapping[str, str], inside: Mapping[str, str], scratch: str
) -> dict[str, str]:
    """The environment of the runtime's own process: little of the host's, and `inside` under its prefix.

    `--env` would put the values on argv; a variable with the prefix APPTAINERENV_ reaches the container all the same
    and is readable by nobody but its owner.
    """
    prefix = runtime.upper()
    kept = {name: host[name] for name in _HOST_VARIABLES if name in host}
    kept[f"{prefix}_TMPDIR"] = scratch
    for name in ("CACHEDIR", "CONFIGDIR"):
        if f"{prefix}_{name}" in host:
            kept[f"{prefix}_{name}"] = host[f"{prefix}_{name}"]
    return kept | {f"{prefix}ENV_{name}": value for name, value in inside.items()}


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


def build_pull_argv(runtime: Runtime, target: str, reference: str, *, arch: str, plain_http: bool) -> list[str]:
    """The argv that fetches `reference` (docker://…, oras://…) and converts it to the SIF file `target`."""
    return [runtime, "pull", "--arch", arch, *(["--no-https"] if plain_http else []), target, reference]
