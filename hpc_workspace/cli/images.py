"""`hpc-workspace images …`: the store, from a shell."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_workspace.text import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from hpc_workspace.images.inventory import Checked
    from hpc_workspace.images.plan import Plan
    from hpc_workspace.images.progress import Step, Tell

_DAY_S = 24 * 3600.0


@click.group()
def images() -> None:
    """Images: fetch, list, check and remove what workspaces run in."""


def _store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--store", metavar="DIR", help="The store; default $HPC_WORKSPACE_CACHE, else ~/.apptainer_cache."
    )(command)


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")(command)


def _platform_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--platform", metavar="OS/ARCH", help="Such as linux/arm64; default this machine's.")(command)


@images.command()
@click.argument("references", nargs=-1, required=True)
@_store_option
@_platform_option
@_json_option
@click.option("--runtime", default="auto", help="auto, apptainer, singularity.")
@click.option(
    "--pull-policy",
    type=click.Choice(["missing", "newer", "always"]),
    default="missing",
    help="missing: what the store has is taken; newer: the registry is asked; always: fetched anew.",
)
@click.option("--here", is_flag=True, help="Fetch on this machine, whatever images.fetch_on says.")
def pull(
    references: tuple[str, ...],
    store: str | None,
    platform: str | None,
    as_json: bool,
    runtime: str,
    pull_policy: Any,
    here: bool,
) -> None:
    """Fetch images into the store and print where they are. One that can't be had does not keep the others back.

    \b
    hpc-workspace images pull docker://python:3.12 oras://registry.example.org/team/tool:1
    """
    from hpc_workspace.errors import ConfigError, ImageError, PrerequisiteError, WorkspaceError
    from hpc_workspace.images import cache_dir
    from hpc_workspace.options import this_platform
    from hpc_workspace.request import resolve_image

    paths = {}
    errors: list[WorkspaceError] = []
    with _Shown() as shown:
        for reference in references:
            try:
                paths[reference] = resolve_image(
                    reference,
                    runtime=runtime,
                    store=cache_dir(store),
                    platform=platform or this_platform(),
                    pull_policy=pull_policy,
                    slurm=None,
                    tell=shown.tell,
                    say=shown.say,
                    here=here,
                )
            except (ConfigError, ImageError, PrerequisiteError) as error:
                errors.append(error)
    if as_json:
        click.echo(json.dumps(paths))
    else:
        for path in paths.values():
            click.echo(path)
    for earlier in errors[:-1]:
        click.echo(f"hpc-workspace: {earlier}", err=True)
    if errors:
        raise errors[-1]


class _Shown:
    """A fetch's progress: a bar on a terminal, lines elsewhere; both on stderr."""

    def __init__(self) -> None:
        from hpc_workspace.images.progress import as_lines

        self._bar: Any = None
        self._tasks: dict[str, tuple[str, Any]] = {}
        self.tell: Tell = as_lines(self.say)

    def __enter__(self) -> _Shown:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            text, amount = (
                TextColumn(f"{{{name}}}", markup=False) for name in ("task.description", "task.fields[amount]")
            )
            self._bar = Progress(text, BarColumn(), amount, TimeElapsedColumn(), console=Console(stderr=True))
            self._bar.start()
            self.tell = self._tell_bar
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def _tell_bar(self, step: Step) -> None:
        """One bar an image, which begins anew, with its clock, at each new thing that happens to the image."""
        from hpc_workspace.images.progress import how_far

        text, task = self._tasks.get(step.reference, ("", None))
        if text != step.text:
            if task is not None:
                self._bar.remove_task(task)
            task = self._bar.add_task(f"{step.reference}: {step.text}", total=step.total_bytes, amount="")
            self._tasks[step.reference] = (step.text, task)
        self._bar.update(task, completed=step.done_bytes or 0, amount=how_far(step))


@images.command(name="ls")
@_store_option
@_json_option
def ls(store: str | None, as_json: bool) -> None:
    """List what is in the store."""
    from hpc_workspace.images import cache_dir
    from hpc_workspace.images.inventory import list_images
    from hpc_workspace.images.store import Store

    found = list_images(Store(cache_dir(store)))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(image) | {"path": str(image.path)} for image in found]))
        return
    for image in found:
        digest = image.digest.removeprefix("sha256:")[:12] or "-" * 12
        unused = f"unused for {image.unused_s / _DAY_S:.0f} d" if image.unused_s > _DAY_S else ""
        for name in image.names or ("(no name)",):
            click.echo(
                f"{name:50} {digest}  {image.platform:12} {format_bytes(image.size_bytes):>9}  {unused}".rstrip()
            )
    click.echo(f"{len(found)} images, {format_bytes(sum(image.size_bytes for image in found))}", err=True)


@images.command()
@_store_option
@_json_option
def verify(store: str | None, as_json: bool) -> None:
    """Read every image and toolbox of the store and compare with its checksum. Exits 1 if one was changed."""
    from hpc_workspace.images import cache_dir
    from hpc_workspace.images.inventory import verify as verify_store
    from hpc_workspace.images.store import Store

    def show(checked: Checked) -> None:
        if not as_json:
            click.echo(f"{'BAD ' if checked.wrong else 'good'}  {checked.name}  {checked.wrong}".rstrip())

    found = verify_store(Store(cache_dir(store)), show)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(checked) | {"path": str(checked.path)} for checked in found]))
    bad = [checked for checked in found if checked.wrong]
    for checked in bad:
        again = f"hpc-workspace images pull --pull-policy always {checked.name.partition(', ')[0]}"
        again = f"rm {checked.path}" if checked.name == checked.path.name else again
        click.echo(f"To have it anew: {f'rm -r {checked.path}' if checked.path.is_dir() else again}", err=True)
    sys.exit(1 if bad else 0)


@images.command()
@_store_option
@_json_option
@click.option("--unused-for", metavar="TIME", help="Also images that nobody has taken for so long, such as 30d.")
@click.option("--all", "all_", is_flag=True, help="All images but those of living workspaces.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def prune(store: str | None, as_json: bool, unused_for: str | None, all_: bool, dry_run: bool) -> None:
    """Remove what is of no use any more: layers of finished fetches, halves of dead ones, old toolboxes.

    Images go only with --unused-for or --all, and never those of living workspaces. Exits 1 if something could not be
    removed.
    """
    from hpc_workspace.errors import ConfigError
    from hpc_workspace.images import cache_dir
    from hpc_workspace.images.inventory import prune as prune_store
    from hpc_workspace.images.store import Store
    from hpc_workspace.options import parse_duration_s
    from hpc_workspace.rendezvous import paths_in_use
    from hpc_workspace.toolbox import toolbox_path

    try:
        unused_for_s = 0.0 if all_ else parse_duration_s(unused_for)
    except ValueError as error:
        raise ConfigError(f"--unused-for {unused_for!r} {error}.", option="unused_for") from error
    root = cache_dir(store)
    pruned = prune_store(
        Store(root), unused_for_s=unused_for_s, in_use=paths_in_use(), keep_toolbox=toolbox_path(root), dry_run=dry_run
    )
    if as_json:
        removed = [{"path": str(path), "size_bytes": size} for path, size in pruned.removed]
        click.echo(json.dumps({"removed": removed, "left": pruned.left, "dry_run": dry_run}))
    else:
        for path, size in pruned.removed:
            click.echo(f"{'would remove' if dry_run else 'removed'}  {format_bytes(size):>9}  {path.relative_to(root)}")
        for text in pruned.left:
            click.echo(f"LEFT  {text}")
        click.echo(f"{format_bytes(pruned.size_bytes)} {'would be free' if dry_run else 'freed'}", err=True)
    sys.exit(1 if pruned.left else 0)


@images.command()
@click.argument("file", type=click.Path(path_type=Path))
@_store_option
@_platform_option
@_json_option
def plan(file: Path, store: str | None, platform: str | None, as_json: bool) -> None:
    """Say what the images of a batch take: which are missing, how large, how long at the registry's rate limit.

    FILE has one reference a line, or JSON lines with an "image" each. Exits 1 if one can't be had.
    """
    from hpc_workspace.config import load_settings
    from hpc_workspace.images import cache_dir
    from hpc_workspace.images.fetch import Fetcher
    from hpc_workspace.images.plan import make_plan, read_references
    from hpc_workspace.images.store import Store
    from hpc_workspace.options import this_platform

    fetcher = Fetcher(
        Store(cache_dir(store)),
        load_settings().images,
        runtime="auto",
        platform=platform or this_platform(),
        tell=lambda step: None,
    )
    made = make_plan(fetcher, read_references(file))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(made)))
    else:
        _print_plan(made)
    sys.exit(1 if any(image.state == "error" for image in made.images) else 0)


def _print_plan(made: Plan) -> None:
    for image in made.images:
        size = "" if image.download_bytes is None else format_bytes(image.download_bytes)
        click.echo(f"{image.state:8} {size:>9} {image.uses:5} x  {image.image}  {image.error}".rstrip())
    counts = [f"{sum(i.state == state for i in made.images)} {state}" for state in ("here", "missing", "error")]
    click.echo(f"{', '.join(counts)}; {format_bytes(made.download_bytes)} to download", err=True)
    for host, limit in made.rate_limits.items():
        left = "" if limit.remaining is None else f", {limit.remaining} left"
        click.echo(f"{host}: {limit.pulls} pulls in {limit.window_s / 3600:g} h{left}", err=True)
    if made.wait_s:
        click.echo(f"At that rate the rest takes at least {made.wait_s / 3600:.1f} h.", err=True)
