"""`hpc-workspace doctor`: what is found, on one screen; what to do about it; and the settings that fit."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from typing import TYPE_CHECKING

import click

from hpc_workspace.cli.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from hpc_workspace.doctor.finding import Finding
    from hpc_workspace.doctor.site import Site
    from hpc_workspace.options import SlurmOptions

_DEFAULT_PARTITION = ""
_WIDTH = 100
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.option(
    "--node",
    "partition",
    metavar="[PARTITION]",
    is_flag=False,
    flag_value=_DEFAULT_PARTITION,
    default=None,
    help="Look at a compute node too, by a small job; of the default partition, or of PARTITION.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: findings, node, config.")
@click.option("--save", is_flag=True, help="Write the settings that fit to the configuration file, if there is none.")
@click.option("--nodelist", metavar="NODE", help="With --node: on this node.")
@click.option("--queue-timeout", default="5min", show_default=True, help="With --node: how long its job may wait.")
def doctor(partition: str | None, as_json: bool, save: bool, nodelist: str | None, queue_timeout: str) -> None:
    """Look at what works here, say what to do about what does not, and which settings fit. Exits 1 if something fails.

    \b
    hpc-workspace doctor
    hpc-workspace doctor --node gpu
    """
    from hpc_workspace.doctor import advice
    from hpc_workspace.doctor.checks import MACHINE, SITE
    from hpc_workspace.doctor.runner import run_checks
    from hpc_workspace.doctor.site import Site

    patience_s = _seconds(queue_timeout)
    node = ""
    with Waiting() as waiting:
        site = Site()
        if sys.stderr.isatty():
            waiting.say("looking at this machine")
        findings = run_checks([*MACHINE, *SITE], site)
        if partition is not None or nodelist is not None:
            from hpc_workspace.doctor.reach import examine_node

            options = _job_options(site, partition or None, nodelist)
            node, more = examine_node(site, options, findings, say=waiting.say, queue_timeout_s=patience_s)
            findings += more
    config = advice.format_config(findings)
    if as_json:
        found = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"findings": found, "node": node or None, "config": config}))
    else:
        _print_findings(findings, node)
        _print_config(config, hint=not save)
    if save and config:
        click.echo(f"saved as {advice.save(config)}", err=True)
    sys.exit(1 if any(finding.level == "fail" for finding in findings) else 0)


def _seconds(text: str) -> float:
    from hpc_workspace.errors import ConfigError
    from hpc_workspace.options import parse_duration_s

    try:
        return parse_duration_s(text) or 0.0
    except ValueError as error:
        raise ConfigError(f"--queue-timeout {text!r} {error}.", option="queue_timeout") from error


def _job_options(site: Site, partition: str | None, nodelist: str | None) -> SlurmOptions:
    """What a workspace's job would ask for, on that partition and node where they are named."""
    from hpc_workspace.options import SlurmOptions

    named = {"partition": partition, "nodelist": nodelist}
    given = {name: value for name, value in named.items() if value is not None}
    return site.settings.fill_in_slurm(SlurmOptions(**given))


def _print_findings(findings: Sequence[Finding], node: str) -> None:
    """A table on a terminal, a line for each finding elsewhere; then what is wrong, why it matters and what to do."""
    if sys.stdout.isatty():
        _print_table(findings, node)
    else:
        for finding in findings:
            where = f"{finding.node or 'here':8} " if node else ""
            click.echo(f"{finding.level:5} {where}{finding.name:20} {finding.found}")
    for finding in findings:
        if finding.level != "ok":
            where = f" on {finding.node}" if finding.node else ""
            click.echo(f"\n{finding.level}: {finding.name}{where}: {finding.found}")
            for text in (finding.why, finding.remedy):
                if text:
                    click.echo(textwrap.indent(textwrap.fill(text, _WIDTH), "  "))


def _print_table(findings: Sequence[Finding], node: str) -> None:
    """One row a check, with a column for this machine and one for the node."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        rows.setdefault(finding.name, {})[finding.node] = finding
    table = Table(box=None, pad_edge=False, header_style="bold")
    places = ["", node] if node else [""]
    table.add_column("", no_wrap=True)
    for place in places:
        table.add_column(place or "here", no_wrap=len(places) == 1, overflow="ellipsis")
    for name, row in rows.items():
        cells = [_cell(row.get(place)) for place in places]
        levels = [found.level for found in row.values()]
        worst = next(level for level in ("fail", "warn", "ok") if level in levels)
        table.add_row(Text(name, style=_COLOURS[worst]), *cells)
    Console().print(table)


def _cell(found: Finding | None) -> Text:
    """What was found, with its level in words where that is not ok: colours may be off."""
    from rich.text import Text

    if found is None or found.level == "ok":
        return Text(found.found if found is not None else "")
    return Text(f"{found.level}: {found.found}", style=_COLOURS[found.level])


def _print_config(config: str, *, hint: bool) -> None:
    from hpc_workspace.config import config_file

    click.echo()
    if not config:
        click.echo("The settings that hold fit: nothing to change.")
        return
    path = config_file()
    how = f"; --save writes them to {path}" if hint and not path.exists() else f", for {path}"
    click.echo(f"# Settings that fit here{how}:")
    click.echo(config, nl=False)
