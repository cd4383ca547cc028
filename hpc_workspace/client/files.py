"""Files of a workspace, through its agent server."""

from __future__ import annotations

import io
import os
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hpc_workspace import clock
from hpc_workspace.client.calls import Caller, Patience
from hpc_workspace.client.commands import Commands
from hpc_workspace.errors import ServerUnavailableError, TunnelError
from hpc_workspace.results import FileOperationResult

_COPY_BYTES = 1024 * 1024


class Files:
    """Moves files by `caller`; what OpenHands' server can't do with them is done by `commands`."""

    def __init__(self, caller: Caller, commands: Commands) -> None:
        self._caller = caller
        self._commands = commands

    def upload(self, source: Path, destination: str) -> FileOperationResult:
        """Copy a file of ours into the workspace, with its mode; memory does not grow with its size."""
        path = self._caller.absolute(destination)
        found = source.stat()
        with source.open("rb") as file:
            if self._caller.is_bundled:
                params = {"path": path, "mode": f"{found.st_mode & 0o777:04o}", "mtime": repr(found.st_mtime)}
                self._put(file, found.st_size, params)
            else:
                self._upload_form(file, path)
                self._commands.execute(
                    f"chmod {found.st_mode & 0o777:04o} {shlex.quote(path)}", cwd="/", timeout_s=30, env=None
                )
        return FileOperationResult(source_path=str(source), destination_path=path, file_size=found.st_size)

    def write(self, data: bytes, destination: str, mode: int) -> FileOperationResult:
        """Put bytes into a file of the workspace."""
        path = self._caller.absolute(destination)
        if self._caller.is_bundled:
            # In pieces: one large buffer is sliced anew for every packet further down.
            self._put(io.BytesIO(data), len(data), {"path": path, "mode": f"{mode:04o}"})
        else:
            self._upload_form(io.BytesIO(data), path)
        return FileOperationResult(source_path="", destination_path=path, file_size=len(data))

    def _put(self, file: BinaryIO, size: int, params: dict[str, str]) -> None:
        def content() -> dict[str, Any]:
            file.seek(0)
            return {"content": _chunks(file)}

        self._caller.send(
            "PUT", "/api/file/raw", params=params, headers={"Content-Length": str(size)}, content_of=content
        )

    def _upload_form(self, file: BinaryIO, path: str) -> None:
        def content() -> dict[str, Any]:
            file.seek(0)
            return {"files": {"file": ("upload", file)}}

        self._caller.send("POST", "/api/file/upload", params={"path": path}, content_of=content)

    def download(self, source: str, destination: Path) -> FileOperationResult:
        """Copy a file of the workspace to ours, whole or not at all, with its mode where the server tells it."""
        path = self._caller.absolute(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        patience = Patience()
        call_began_s = clock.now_s()
        while True:
            began_s = clock.now_s()
            try:
                size = self._download_once(path, destination, call_began_s)
            except (TunnelError, ServerUnavailableError) as error:
                patience.wait(error, began_s)
            else:
                return FileOperationResult(source_path=path, destination_path=str(destination), file_size=size)

    def _download_once(self, path: str, destination: Path, call_began_s: float) -> int:
        """Copy a file whole or not at all. Returns its size in bytes."""
        aside = destination.parent / f".{destination.name}.{secrets.token_hex(6)}.part"
        began_s = clock.now_s()
        response = self._caller.send(
            "GET", "/api/file/download", params={"path": path}, is_streamed=True, call_began_s=call_began_s
        )
        size = 0
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for piece in self._caller.guarded(response.iter_raw(_COPY_BYTES), began_s):
                    file.write(piece)
                    size += len(piece)
                os.fchmod(file.fileno(), int(response.headers.get("X-File-Mode", "0644"), 8) & 0o777)
            aside.replace(destination)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        finally:
            response.close()
        return size

    def read(self, source: str) -> bytes:
        """The content of a file of the workspace."""
        return self._caller.send("GET", "/api/file/download", params={"path": self._caller.absolute(source)}).content


def _chunks(file: Any) -> Iterator[bytes]:
    while data := file.read(_COPY_BYTES):
        yield data
