"""From files to a SIF: the runtime's own conversion, kept to a bound of CPUs and memory, ended when we are."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hpc_workspace import apptainer, clock, processes
from hpc_workspace.config import ImageSettings
from hpc_workspace.errors import ImageError, PrerequisiteError

_TIMEOUT_S = 12 * 3600.0
_HELP_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 15.0
_TELL_EVERY_S = 1.0
_DEFAULT_CPUS = 2
_DEFAULT_MEMORY = "1G"
_SMALLEST_MEMORY_MB = 128
_TAIL_LINES = 8
# What programs print when a disk or a quota is full; strerror(3) of ENOSPC and EDQUOT.
_FULL = ("no space left on device", "disk quota exceeded", "write failed because")


class Limits:
    """What a conversion may use: the settings, else a job's share of its node, else little.

    Attributes:
        cpus: as a number of them.
        memory: for mksquashfs's buffers, as its -mem takes it.
    """

    def __init__(self, settings: ImageSettings, environment: Mapping[str, str]) -> None:
        allowed = len(os.sched_getaffinity(0))
        in_job = "SLURM_JOB_ID" in environment
        self.cpus = settings.convert_cpus or (allowed if in_job else min(_DEFAULT_CPUS, allowed))
        self.memory = settings.convert_memory or (_half_of_job(environment) if in_job else _DEFAULT_MEMORY)


def _half_of_job(environment: Mapping[str, str]) -> str:
    """Half of the job's memory. Source: sbatch(1) 24.11, OUTPUT ENVIRONMENT VARIABLES, in megabytes; 0 means all."""
    per_node, per_cpu, cpus = (
        environment.get(name, "") for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")
    )
    if per_node.isdigit():
        megabytes = int(per_node)
    elif per_cpu.isdigit():
        megabytes = int(per_cpu) * (int(cpus) if cpus.isdigit() else 1)
    else:
        megabytes = 0
    return f"{max(_SMALLEST_MEMORY_MB, megabytes // 2)}M" if megabytes else _DEFAULT_MEMORY


def convert(
    source: str, work: Path, *, runtime: apptainer.Runtime, limits: Limits, on_wait: Callable[[], None]
) -> Path:
    """The SIF file made of `source` (`oci:layout`, relative to `work`), in `work`.

    Args:
        work: a directory of its own; the runtime's cache and temporary files are below it, unless the user's
            APPTAINER_TMPDIR says where these go.
        on_wait: called at the start, and about once a second while it runs.

    Raises:
        ImageError: the runtime can't convert it, or there is no room.
        PrerequisiteError: the runtime is not there.
    """
    target = work / "image.sif"
    argv = apptainer.build_convert_argv(runtime, target.name, source, squashfs_args=_squashfs_args(runtime, limits))
    environment = apptainer.build_environment(runtime, os.environ, {}, _tmpdir(runtime, work), {})
    _run(argv, work, environment | _own_cache(runtime, work), limits, on_wait)
    apptainer.require_image(str(target))
    return target


def pull(
    reference: str,
    work: Path,
    *,
    runtime: apptainer.Runtime,
    arch: str,
    limits: Limits,
    on_wait: Callable[[], None],
) -> Path:
    """The SIF file of what the runtime alone knows how to fetch, in `work`. Raises: as `convert`."""
    target = work / "image.sif"
    argv = apptainer.build_pull_argv(runtime, target.name, reference, arch=arch)
    # All of the user's environment: proxies, certificates and library tokens are the runtime's own matter here.
    environment = dict(os.environ) | {f"{runtime.upper()}_TMPDIR": _tmpdir(runtime, work)}
    _run(argv, work, environment | _own_cache(runtime, work), limits, on_wait)
    apptainer.require_image(str(target))
    return target


def _squashfs_args(runtime: apptainer.Runtime, limits: Limits) -> str:
    try:
        said = processes.run([runtime, "build", "--help"], timeout_s=_HELP_TIMEOUT_S)
    except processes.ProgramTimeoutError as error:
        raise PrerequisiteError(f"{runtime} does not answer.", evidence=str(error)) from error
    return apptainer.format_squashfs_args(said.stdout, cpus=limits.cpus, memory=limits.memory)


def _tmpdir(runtime: apptainer.Runtime, work: Path) -> str:
    (work / "tmp").mkdir(mode=0o700)
    return os.environ.get(f"{runtime.upper()}_TMPDIR") or str(work / "tmp")


def _own_cache(runtime: apptainer.Runtime, work: Path) -> dict[str, str]:
    return {f"{runtime.upper()}_CACHEDIR": str(work / "cache")}


def _run(
    argv: Sequence[str], work: Path, environment: dict[str, str], limits: Limits, on_wait: Callable[[], None]
) -> None:
    keeper = [sys.executable, "-P", "-m", "hpc_workspace.images.keeper", "--cpus", str(limits.cpus), "--", *argv]
    # Go makes as many threads as there are CPUs when it starts, whatever it may use of them later.
    environment["GOMAXPROCS"] = str(limits.cpus)
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    log = work / "conversion.log"
    with log.open("xb") as output:
        child = processes.spawn(keeper, output=output, env=environment, cwd=str(work), lifeline=True)
    deadline = clock.Deadline(_TIMEOUT_S)
    on_wait()
    try:
        while (code := child.wait(_TELL_EVERY_S)) is None:
            on_wait()
            if deadline.is_over:
                raise ImageError(f"{argv[0]} did not finish in {_TIMEOUT_S / 3600:.0f} hours.", evidence=_tail(log))
    finally:
        if child.returncode() is None:
            child.send_signal(15)
            child.wait(_END_TIMEOUT_S)
    if code != 0:
        said = _tail(log)
        is_full = any(sign in said.lower() for sign in _FULL)
        raise ImageError(
            f"{argv[0]} can't convert it (exit code {code}).",
            evidence=said,
            remedy="hpc-workspace images prune makes room; cache_dir (HPC_WORKSPACE_CACHE) and APPTAINER_TMPDIR name "
            "other places."
            if is_full
            else "",
        )


def _tail(log: Path) -> str:
    """The last lines of what was printed, the runtime's own errors if there are any; no control characters."""
    text = ""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16 * 1024))
        text = file.read().decode("utf-8", "replace")
    lines = [apptainer.printable(line) for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith(("FATAL", "ERROR"))]
    return "\n".join((fatal or lines)[-_TAIL_LINES:])
