"""Files and directories of a workspace: which way they go, and what is told of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hpc_workspace.client.calls import Caller
from hpc_workspace.client.commands import Commands
from hpc_workspace.client.failures import until_unchanged
from hpc_workspace.client.local import (
    BytesLanding,
    BytesSource,
    DiskLanding,
    DiskSource,
    Found,
    Landing,
    PipeLanding,
    PipeSource,
    Progress,
    Source,
    printable,
)
from hpc_workspace.client.plain_files import PlainFiles
from hpc_workspace.client.raw_files import RawFiles
from hpc_workspace.client.shared import SharedMount
from hpc_workspace.errors import FileError
from hpc_workspace.results import FileOperationResult

log = logging.getLogger(__name__)


class Files:
    """Moves files by `caller`; what OpenHands' server can't do with them is done by `commands`.

    Args:
        mount: the directory that is here and in the workspace, if there is one.
    """

    def __init__(self, caller: Caller, commands: Commands, mount: SharedMount | None = None) -> None:
        self._caller = caller
        self._server: RawFiles | PlainFiles
        self._server = RawFiles(caller) if caller.is_bundled else PlainFiles(caller, commands)
        self._mount = mount

    def upload(self, source: Path, destination: str, on_progress: Progress | None = None) -> FileOperationResult:
        """Copy a file or a directory of ours into the workspace; see `Workspace.file_upload`."""
        path = self._caller.absolute(destination)
        return until_unchanged(lambda: self._upload_unchanged(source, path, on_progress or _ignore))

    def _upload_unchanged(self, source: Path, path: str, on_progress: Progress) -> FileOperationResult:
        with contextlib.closing(DiskSource(source)) as opened:
            _tell_left_out(opened.left_out, source)
            self._put(opened, path, on_progress)
            return _result(str(source), path, opened.content_bytes)

    def write(self, data: bytes, destination: str, mode: int) -> FileOperationResult:
        """Put bytes into a file of the workspace."""
        path = self._caller.absolute(destination)
        self._put(BytesSource(data, mode), path, _ignore)
        return _result("", path, len(data))

    def upload_pipe(self, pipe: BinaryIO, destination: str, on_progress: Progress | None = None) -> FileOperationResult:
        """Put what comes from a pipe, until its end, into a file of the workspace. A broken connection ends it."""
        path = self._caller.absolute(destination)
        source = PipeSource(pipe)
        self._server.put(source, path, on_progress or _ignore)
        return _result("-", path, source.content_bytes)

    def _put(self, source: Source, path: str, on_progress: Progress) -> None:
        if self._mount is None or not self._mount.put(self._server, source, path, on_progress):
            self._server.put(source, path, on_progress)

    def download(self, source: str, destination: Path, on_progress: Progress | None = None) -> FileOperationResult:
        """Copy a file or a directory of the workspace to ours; see `Workspace.file_download`."""
        path = self._caller.absolute(source)
        size = self._get(path, lambda found: DiskLanding(destination, found), on_progress or _ignore)
        return _result(path, str(destination), size)

    def read(self, source: str) -> bytes:
        """The content of a file of the workspace."""
        landings: list[BytesLanding] = []

        def land(found: Found) -> Landing:
            _require_file(source, found)
            landings.append(BytesLanding())
            return landings[-1]

        self._get(self._caller.absolute(source), land, _ignore)
        return bytes(landings[-1].data)

    def download_pipe(self, source: str, pipe: BinaryIO, on_progress: Progress | None = None) -> FileOperationResult:
        """Give the content of a file of the workspace to a pipe.

        Raises:
            FileChangedError: it changed meanwhile: what was given is not worth anything.
        """
        path = self._caller.absolute(source)
        given: list[PipeLanding] = []

        def land(found: Found) -> Landing:
            _require_file(source, found)
            if given and given[-1].size:
                raise FileError(
                    f"{printable(source)} changes while it is read.",
                    path=source,
                    evidence=f"{given[-1].size} bytes of it were given already.",
                    remedy="Throw them away; copy it to a file.",
                )
            given.append(PipeLanding(pipe))
            return given[-1]

        return _result(path, "-", self._get(path, land, on_progress or _ignore))

    def _get(self, path: str, land: Callable[[Found], Landing], on_progress: Progress) -> int:
        if self._mount is not None and (size := self._mount.get(self._server, path, land, on_progress)) is not None:
            return size
        found, size = self._server.get(path, land, on_progress)
        _tell_left_out(found.left_out, path)
        return size

    def is_directory(self, path: str) -> bool | None:
        """Whether there is a directory at `path`; None: there is nothing. Raises: ServerFileError, TunnelError."""
        from hpc_workspace.errors import ServerFileError

        try:
            found = self._server.look(self._caller.absolute(path))
        except ServerFileError as error:
            if error.status == 404:
                return None
            raise
        return (found.kind if isinstance(found, Found) else found["kind"]) == "directory"


def _require_file(path: str, found: Found) -> None:
    if found.kind != "file":
        raise FileError(f"{printable(path)} is a directory in the workspace.", path=path, errno=21)


def _tell_left_out(names: tuple[str, ...], path: Path | str) -> None:
    for name in names:
        log.warning("%s: %r is a socket, a FIFO or a device: it is left out", printable(str(path)), printable(name))


def _result(source: str, destination: str, size: int) -> FileOperationResult:
    # Not validated: a path may have bytes that are not UTF-8, which pydantic takes for no text.
    return FileOperationResult.model_construct(
        success=True, source_path=source, destination_path=destination, file_size=size, error=None
    )


def _ignore(_done: int, _total: int | None) -> None:
    """Nobody wants to know how far it is."""
