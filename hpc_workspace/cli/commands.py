"""The commands of `hpc-workspace`: each reads its options and calls the library."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import click

from hpc_workspace.cli.batch import batch
from hpc_workspace.cli.cp import cp
from hpc_workspace.cli.doctor import doctor
from hpc_workspace.cli.images import images
from hpc_workspace.cli.output import as_line, print_stream, short_time
from hpc_workspace.cli.shell import exec_, shell
from hpc_workspace.cli.waiting import Waiting
from hpc_workspace.cli.workspace_options import pop_slurm, workspace_options
from hpc_workspace.version import __version__

if TYPE_CHECKING:
    from hpc_workspace.workspace import ApptainerWorkspace


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Log everything, and show tracebacks.")
def cli(debug: bool) -> None:
    """Agent workspaces in Apptainer containers, on this machine or in a Slurm job."""
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def _make_workspace(values: dict[str, Any]) -> ApptainerWorkspace:
    """The workspace that the options ask for.

    Raises:
        ConfigError: they contradict each other; also Slurm's options without --slurm.
    """
    from hpc_workspace.workspace import ApptainerWorkspace

    if (slurm := pop_slurm(values)) is not None:
        values["slurm"] = slurm
    is_dry = values.pop("dry_run")
    workspace = ApptainerWorkspace(**{name: value for name, value in values.items() if value is not None})
    workspace.on_progress = lambda text: click.echo(text, err=True)
    if is_dry:
        click.echo(workspace.dry_run(), nl=False)
        sys.exit(0)
    return workspace


def _start_workspace(values: dict[str, Any]) -> ApptainerWorkspace:
    """The workspace that the options ask for, once it can be used. What is waited for is shown."""
    workspace = _make_workspace(values)
    lines = workspace.on_progress
    with Waiting() as waiting:
        workspace.on_progress = waiting.say
        workspace.start()
    workspace.on_progress = lines
    return workspace


@cli.command()
@workspace_options
@click.option("--timeout", type=float, help="Seconds for the command; none by default.")
@click.argument("command", nargs=-1, required=True)
def run(command: tuple[str, ...], timeout: float | None, **options: Any) -> None:
    """Run one COMMAND in a new workspace, print its output as it comes, and exit with its code.

    One argument is a line of shell; several are one program with its arguments.

    \b
    hpc-workspace run --slurm -p cpu -t 5 --image python.sif -- 'hostname; id -un'
    """
    line = as_line(command)
    with _start_workspace(options) as workspace:
        code = print_stream(workspace.stream_command(line, timeout=timeout))
    sys.exit(code)


@cli.command()
@workspace_options
@click.option("--idle-timeout", help="End after so long without a client, such as 15min.")
def up(**options: Any) -> None:
    """Start a workspace, leave it running, and print its id.

    \b
    id=$(hpc-workspace up --slurm -p cpu -t 60 --image python.sif)
    """
    workspace = _start_workspace(options)
    click.echo(workspace.detach())


cli.add_command(shell)
cli.add_command(cp)
cli.add_command(exec_)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
def ps(as_json: bool) -> None:
    """List the workspaces that have not ended: where, since when, for how long yet, and for how long unused."""
    from hpc_workspace import overview

    found = overview.look()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(one) for one in found]))
        return
    rows: list[tuple[str, ...]] = [("ID", "STATE", "NODE", "JOB", "RUNTIME", "AGE", "LEFT", "IDLE")]
    for one in found:
        named = (one.workspace_id, one.state, one.node or "-", one.job_id or "-", one.runtime or "-")
        rows.append((*named, *(short_time(seconds) for seconds in (one.age_s, one.time_left_s, one.idle_s))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if found else ():
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for one in found:
        if one.notice:
            click.echo(f"{one.workspace_id}: {one.notice}", err=True)


@cli.command()
@click.argument("workspace_id")
@click.option("-f", "--follow", is_flag=True, help="Go on until the workspace has ended, or Ctrl-C.")
@click.option("--node", is_flag=True, help="The node program's log, not the agent server's.")
def logs(workspace_id: str, follow: bool, node: bool) -> None:
    """Print what the agent server of WORKSPACE_ID has printed, also after it has ended badly."""
    from hpc_workspace import logs as log_files
    from hpc_workspace.rendezvous import require_workspace

    directory = require_workspace(workspace_id)
    path = directory.node_log if node else directory.server_log
    for line in log_files.read_lines(path, until=directory.has_ended if follow else lambda: True):
        click.echo(line)


@cli.command()
@click.argument("workspace_ids", nargs=-1, required=True)
def down(workspace_ids: tuple[str, ...]) -> None:
    """End workspaces and wait until nothing of them is left."""
    from hpc_workspace.workspace import Workspace

    for workspace_id in workspace_ids:
        Workspace.attach(workspace_id).close()
        click.echo(f"{workspace_id} ended")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object: ended, removed, left.")
def reap(as_json: bool) -> None:
    """Remove what your dead workspaces left on this node: processes, mounts, scratch directories, records.

    Every start does the same for what it finds; run this where nothing will start. What lives, or belongs to a
    workspace that can't be judged from here, is left alone. Exits 1 if something could not be removed.

    \b
    srun -w n07 hpc-workspace reap
    """
    from hpc_workspace.node.reap import reap_this_node

    found = reap_this_node()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
    else:
        for word, things in (("ended", found.ended), ("removed", found.removed), ("LEFT", found.left)):
            for thing in things:
                click.echo(f"{word:8} {thing}")
        if not (found.ended or found.removed or found.left):
            click.echo("nothing to reap")
    sys.exit(1 if found.left else 0)


cli.add_command(images)
cli.add_command(batch)
cli.add_command(doctor)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object: key to value and origin.")
def config(as_json: bool) -> None:
    """List the settings: what holds here, and where each value is from (environment, file, or built in).

    An option given to a command or to ApptainerWorkspace counts more than any of them.
    """
    from hpc_workspace.config import config_file, load_settings

    settings = load_settings()
    path = config_file()
    if as_json:
        found = {key: {"value": value, "origin": origin} for key, value, origin in settings.items()}
        click.echo(json.dumps({"file": str(path), "settings": found}))
        return
    click.echo(f"file: {path}{'' if path.exists() else ' (not there)'}", err=True)
    for key, value, origin in settings.items():
        shown = "-" if value in (None, [], {}) else json.dumps(value)
        click.echo(f"{key:28} {shown:24} {origin}")


@cli.command()
@workspace_options
def demo(**options: Any) -> None:
    """Mend a small repository in a real workspace, and show where the time went.

    Takes --sif, --image or $HPC_WORKSPACE_DEMO_IMAGE for Apptainer; with neither it runs as a plain process, which is
    not a sandbox.
    """
    from hpc_workspace.cli.demo import choose_demo_options, run_demo

    sys.exit(run_demo(_make_workspace(choose_demo_options(options, say=lambda text: click.echo(text, err=True)))))
