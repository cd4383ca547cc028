"""`hpc-workspace cp`: files and directories into a workspace, out of it, or from one to another."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hpc_workspace.results import FileOperationResult
    from hpc_workspace.workspace import Workspace

# As scp(1) has it: a name with a slash before its first colon is a file here.
_REMOTE = re.compile(r"([a-z0-9][a-z0-9-]*):(.*)", re.DOTALL)
_BAR_AFTER_S = 1.0
_NAME_MAX = 28


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.argument("destination", metavar="DST")
@click.option("-r", "recursive", is_flag=True, help="Taken for scp's sake: directories need no flag.")
@click.option("-q", "--quiet", is_flag=True, help="No bar.")
def cp(sources: tuple[str, ...], destination: str, recursive: bool, quiet: bool) -> None:
    """Copy files and directories into a workspace, out of it, or from one to another.

    A place in a workspace is ID:PATH; the first letters of the ID do if they are one's alone, and relative paths begin
    where its commands do. Modes and times are kept. Where DST is a directory, or ends in a slash, what is copied goes
    into it by its own name; where a directory of that name is there, the two become one. `-` is stdin or stdout.

    \b
    hpc-workspace cp data/ ws-0a1b2c3d4e:inputs
    hpc-workspace cp ws-0a1b:results ws-0a1b:log.txt .
    hpc-workspace cp ws-0a1b:model.pt - | sha256sum
    """
    with contextlib.ExitStack() as stack:
        places = _Places(stack, quiet)
        target = places.parse(destination)
        found = [places.parse(source) for source in sources]
        if target.workspace is None and any(source.workspace is None for source in found):
            raise click.UsageError("One side must be in a workspace: ID:PATH. (A file here that has a colon: ./a:b)")
        if "-" in (destination, *sources) and len(sources) > 1:
            raise click.UsageError("- goes with one SRC alone.")
        is_directory = places.is_directory(target)
        if len(sources) > 1 and not is_directory:
            raise click.UsageError(f"{destination} is no directory, and there is more than one SRC.")
        for source in found:
            places.copy(source, places.inside(target, source) if is_directory else target)


class _Place:
    """A path here (`workspace` is None) or in a workspace."""

    def __init__(self, workspace: Workspace | None, path: str) -> None:
        self.workspace = workspace
        self.path = path

    @property
    def is_pipe(self) -> bool:
        return self.workspace is None and self.path == "-"

    @property
    def name(self) -> str:
        """What it is called in the directory that it is in; empty where it has no name, such as `..`."""
        last = os.path.basename(os.path.normpath(self.path))  # noqa: PTH119 - of either side
        return "" if last in (".", "..") else last


class _Places:
    """The workspaces of one call, each attached to once."""

    def __init__(self, stack: contextlib.ExitStack, quiet: bool) -> None:
        self._stack = stack
        self._quiet = quiet
        self._workspaces: dict[str, Workspace] = {}

    def parse(self, text: str) -> _Place:
        """The place that an argument names. Raises: RendezvousError: there is no such workspace."""
        match = _REMOTE.fullmatch(text)
        return _Place(self._attach(match[1]), match[2] or ".") if match else _Place(None, text)

    def _attach(self, given: str) -> Workspace:
        from hpc_workspace.workspace import Workspace

        workspace_id = _whole_id(given)
        if workspace_id not in self._workspaces:
            workspace = Workspace.attach(workspace_id)
            self._stack.callback(workspace.disconnect)
            self._workspaces[workspace_id] = workspace
        return self._workspaces[workspace_id]

    def is_directory(self, place: _Place) -> bool:
        """Whether things go into it."""
        if place.is_pipe:
            return False
        if place.path.endswith("/"):
            return True
        if place.workspace is None:
            return Path(place.path).is_dir()
        return place.workspace.is_directory(place.path)

    def inside(self, folder: _Place, source: _Place) -> _Place:
        """The place in a directory that something goes to. What has no name of its own goes into it as it is."""
        return _Place(folder.workspace, f"{folder.path.rstrip('/')}/{source.name}" if source.name else folder.path)

    def copy(self, source: _Place, target: _Place) -> None:
        """Copy one thing."""
        if source.workspace is not None and target.workspace is not None:
            with tempfile.TemporaryDirectory(prefix="hpc-workspace-cp-") as folder:
                between = _Place(None, f"{folder}/{source.name or 'all'}")
                self.copy(source, between)
                self.copy(between, target)
            return
        with _Bar(source.name or source.path, self._quiet) as bar:
            self._transfer(source, target)(on_progress=bar.tell)

    def _transfer(self, source: _Place, target: _Place) -> Callable[..., FileOperationResult]:
        if target.workspace is not None:
            workspace = target.workspace
            if source.is_pipe:
                return lambda **options: workspace.upload_pipe(sys.stdin.buffer, target.path, **options)
            return lambda **options: workspace.file_upload(source.path, target.path, **options)
        assert source.workspace is not None
        found = source.workspace
        if target.is_pipe:
            return lambda **options: found.download_pipe(source.path, sys.stdout.buffer, **options)
        return lambda **options: found.file_download(source.path, target.path, **options)


def _whole_id(given: str) -> str:
    """The id that begins so; `given` itself where there is none, or more than one.

    Raises:
        ConfigError: there is more than one.
    """
    from hpc_workspace.errors import ConfigError
    from hpc_workspace.rendezvous import list_workspaces

    known = [directory.workspace_id for directory in list_workspaces()]
    found = [workspace_id for workspace_id in known if workspace_id.startswith(given)]
    if given in known or not found:
        return given
    if len(found) > 1:
        raise ConfigError(
            f"More than one workspace begins with {given!r}.",
            evidence=", ".join(found),
            remedy="Give more of its id.",
        )
    return found[0]


class _Bar:
    """How far a transfer is: on a terminal, from the second second on; nothing elsewhere."""

    def __init__(self, name: str, quiet: bool) -> None:
        from hpc_workspace.client.local import printable

        self._name = printable(name)
        if len(self._name) > _NAME_MAX:
            self._name = f"{self._name[: _NAME_MAX - 1]}…"
        self._is_wanted = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._deadline: Any = None

    def __enter__(self) -> _Bar:
        from hpc_workspace import clock

        self._deadline = clock.Deadline(_BAR_AFTER_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, done: int, total: int | None) -> None:
        """So much is done."""
        if not self._is_wanted or (self._bar is None and not self._deadline.is_over):
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            name = TextColumn("{task.description}", markup=False)
            columns = (
                name,
                BarColumn(None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._name, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
