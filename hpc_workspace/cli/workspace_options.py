"""The options that several commands have in common: what to run, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from hpc_workspace.options import SlurmOptions


def placement_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what to run and where."""
    for option in reversed(
        [
            click.option("--sif", "sif_file", metavar="FILE", help="A SIF file that holds an agent server."),
            click.option("--image", metavar="REF", help="Any image or SIF; the bundled server is brought along."),
            click.option("--server-image", metavar="REF", help="An agent server's image, such as ghcr.io/…"),
            click.option("--runtime", help="auto (default), apptainer, singularity; process: no container."),
            click.option("--mount-dir", metavar="DIR", help="A directory to see at /workspace."),
            click.option("--fakeroot/--no-fakeroot", "use_fakeroot", default=True, help="Be root inside."),
            click.option("--slurm", is_flag=True, help="Run in a Slurm job."),
            click.option("-p", "--partition", help="Slurm: partition."),
            click.option("-t", "--time", help="Slurm: time limit, as sbatch takes it."),
            click.option("-A", "--account", help="Slurm: account."),
            click.option("-c", "--cpus-per-task", type=int, help="Slurm: CPUs."),
            click.option("--mem", help="Slurm: memory, such as 4G."),
            click.option("--gres", help="Slurm: generic resources, such as gpu:1."),
            click.option("--python", help="Slurm: the interpreter on the node."),
            click.option(
                "--requeue", is_flag=True, default=None, help="Slurm: start it anew after a node failure or preemption."
            ),
            click.option("--setup", multiple=True, help="Slurm: a line of shell before the start; repeatable."),
        ]
    ):
        command = option(command)
    return command


def workspace_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those, and --dry-run."""
    dry_run = click.option("--dry-run", is_flag=True, help="Print what would be run, sbatch and script; run nothing.")
    return placement_options(dry_run(command))


_SLURM_NAMES = ("partition", "time", "account", "cpus_per_task", "mem", "gres", "python", "requeue")


def pop_slurm(values: dict[str, Any]) -> SlurmOptions | None:
    """Take out of `values` what is for Slurm; None without --slurm.

    Raises:
        ConfigError: an option is not valid; also Slurm's options without --slurm.
    """
    from hpc_workspace.errors import ConfigError
    from hpc_workspace.options import SlurmOptions

    slurm_values = {name: values.pop(name) for name in _SLURM_NAMES}
    setup = list(values.pop("setup"))
    given = {name: value for name, value in slurm_values.items() if value is not None}
    if values.pop("slurm"):
        return SlurmOptions(**given, **({"setup": setup} if setup else {}))
    if given or setup:
        raise ConfigError("Options for Slurm were given without --slurm.", remedy="Add --slurm.")
    return None
