"""Fetching where there is a network: one of our own commands as a job of a partition that has one, waited for.

Source: srun(1) of Slurm 24.11. srun and not sbatch: it shows what the command prints as it comes, and takes the job
with it when it is told to end. One that is killed leaves a job that ends when its fetch is done.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from hpc_workspace import processes
from hpc_workspace.config import ImageSettings
from hpc_workspace.errors import ImageError
from hpc_workspace.launch import slurm_commands
from hpc_workspace.options import SlurmOptions

log = logging.getLogger(__name__)

_TAIL_LINES = 12
_END_TIMEOUT_S = 15.0
_DEFAULT_CPUS = 2
# What a fetch may need of the environment, beside what every job gets. Some of it is secret: srun hands it to the step
# over Slurm's own authenticated connection, and it is on no argv.
_EXPORTED = (
    *slurm_commands.EXPORTED,
    "HPC_WORKSPACE_CONFIG",
    "XDG_CONFIG_HOME",
    "DOCKER_CONFIG",
    "DOCKER_AUTH_CONFIG",
    "REGISTRY_AUTH_FILE",
    *(f"{prefix}_{name}" for prefix in ("APPTAINER", "SINGULARITY")
      for name in ("CONFIGDIR", "NOHTTPS", "DOCKER_USERNAME", "DOCKER_PASSWORD")),
    *(f"{name}{ending}" for name in ("HTTP", "HTTPS", "NO", "ALL") for ending in ("_PROXY",)),
    *(f"{name}_proxy" for name in ("http", "https", "no", "all")),
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)  # fmt: skip


def build_srun_argv(settings: ImageSettings, slurm: SlurmOptions | None, command: Sequence[str]) -> list[str]:
    """The argv that runs `command` on a node of `settings.fetch_on` and prints what it prints."""
    return slurm_commands.build_srun_argv(
        name="hpcws-images",
        partition=settings.fetch_on,
        cpus=settings.convert_cpus or _DEFAULT_CPUS,
        exported=exported_names("HPC_WORKSPACE_IMAGES_"),
        slurm=slurm,
        command=command,
    )


def exported_names(prefix: str) -> list[str]:
    """The names of our variables that one of our commands on a node may need, and of all that begin with `prefix`."""
    known = [name for name in _EXPORTED if name in os.environ]
    return known + [name for name in os.environ if name.startswith(prefix) and name not in known]


def run_on_partition(
    settings: ImageSettings, slurm: SlurmOptions | None, arguments: Sequence[str], say: Callable[[str], None]
) -> None:
    """Run `hpc-workspace ARGUMENTS…` on a node of `settings.fetch_on`, to its end; `say` is told each line of it.

    Raises:
        ImageError: it failed, or Slurm did not run it.
        PrerequisiteError: there is no srun.
    """
    python = (slurm.python if slurm is not None else None) or sys.executable
    argv = build_srun_argv(settings, slurm, [python, "-m", "hpc_workspace.cli", *arguments])
    reading, writing = os.pipe()
    lines: list[str] = []
    try:
        child = processes.spawn(argv, output=writing, env=slurm_commands.strip_environment(os.environ))
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    try:
        with os.fdopen(reading, errors="replace") as output:
            for line in output:
                lines.append("".join(c for c in line if c.isprintable()))
                say(lines[-1])
        code = child.wait(_END_TIMEOUT_S)
    finally:
        if child.returncode() is None:
            child.send_signal(15)
            if child.wait(_END_TIMEOUT_S) is None:
                log.warning("srun does not end: the job hpcws-images goes on until its fetch is done")
    if code != 0:
        raise ImageError(
            f"The job on partition {settings.fetch_on} that was to fetch it failed.",
            evidence="\n".join(lines[-_TAIL_LINES:]),
            remedy=f"Try it by hand: srun -p {settings.fetch_on} hpc-workspace images pull --here REFERENCE",
        )
