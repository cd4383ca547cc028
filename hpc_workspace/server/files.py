"""/api/file: upload and download, streamed; a file appears whole or not at all.

Data goes to a temporary file beside its destination, never through /tmp (often 64 MiB in a container).
"""

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hpc_workspace.server.requests import RequestError

_CHUNK_BYTES = 1024 * 1024
_FILE_MODE = 0o644
_DIRECTORY_MODE = 0o755


def file_routes() -> list[Route]:
    """The routes."""
    return [
        Route("/api/file/upload", _upload, methods=["POST"]),
        Route("/api/file/raw", _put_raw, methods=["PUT"]),
        Route("/api/file/download", _download, methods=["GET"]),
    ]


async def _upload(request: Request) -> Response:
    from hpc_workspace.server.multipart import file_part

    path = _path_of(request)
    return await _store(path, file_part(request.headers.get("content-type", ""), request.stream()), None, None)


async def _put_raw(request: Request) -> Response:
    query = request.query_params
    try:
        mode = int(query["mode"], 8) if "mode" in query else None
        mtime = float(query["mtime"]) if "mtime" in query else None
    except ValueError as error:
        raise RequestError(f"mode must be octal and mtime seconds: {error}") from error
    if mode is not None and not 0 <= mode <= 0o7777:
        raise RequestError(f"mode {query['mode']} is not a file mode")
    return await _store(_path_of(request), request.stream(), mode, mtime)


async def _store(path: Path, chunks: AsyncIterator[bytes], mode: int | None, mtime: float | None) -> Response:
    with _as_bad_request(path):
        with await asyncio.to_thread(NewFile, path, mode, mtime) as new:
            async for piece in _gathered(chunks):
                await asyncio.to_thread(new.write, piece)
            await asyncio.to_thread(new.publish)
        return JSONResponse({"success": True, "file_size": new.size})


async def _download(request: Request) -> Response:
    path = _path_of(request)
    try:
        fd = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist", 404) from None
    except OSError as error:
        raise RequestError(f"{path} can't be read: {error.strerror}", 403) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise RequestError(f"{path} is not a regular file", 400)
    headers = {
        "content-length": str(status.st_size),
        "content-disposition": f"attachment; filename*=utf-8''{quote(path.name, errors='surrogateescape')}",
        "x-file-mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "x-file-mtime": f"{status.st_mtime_ns / 1e9:.9f}",
    }
    return StreamingResponse(_content(fd, status.st_size), media_type="application/octet-stream", headers=headers)


async def _content(fd: int, size: int) -> AsyncIterator[bytes]:
    """Exactly the bytes announced: a file that grows meanwhile is cut, one that shrinks breaks the connection."""
    offset = 0
    with os.fdopen(fd, "rb", buffering=0):
        while offset < size:
            data = await asyncio.to_thread(os.pread, fd, min(_CHUNK_BYTES, size - offset), offset)
            if not data:
                return
            offset += len(data)
            yield data


def _path_of(request: Request) -> Path:
    text = request.query_params.get("path")
    if text is None:
        raise RequestError("path is missing")
    if "\0" in text or not text.startswith("/"):
        raise RequestError("Path must be absolute", 400)
    return Path(text)


async def _gathered(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in larger pieces: each costs one hop to a thread."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= _CHUNK_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


@contextlib.contextmanager
def _as_bad_request(path: Path) -> Iterator[None]:
    try:
        yield
    except ClientDisconnect as error:
        raise RequestError("the client went away during the upload", 400) from error
    except OSError as error:
        status = {errno.ENOSPC: 507, errno.EDQUOT: 507, errno.EACCES: 403, errno.EPERM: 403, errno.EROFS: 403}
        number = error.errno or 0
        raise RequestError(f"{path} can't be written: {error.strerror}", status.get(number, 400)) from error


class NewFile:
    """A file being written beside its destination; as a context manager it is removed unless published.

    Args:
        path: absolute; missing parents are made; a symbolic link is followed, as `open` would.
        mode: None keeps that of an existing file, else 0644.
    """

    def __init__(self, path: Path, mode: int | None, mtime: float | None) -> None:
        self._destination = Path(os.path.realpath(path))
        self._mode = mode if mode is not None else _existing_mode(self._destination)
        self._mtime = mtime
        self.size = 0
        _make_parents(self._destination.parent)
        self._part = self._destination.with_name(f".{secrets.token_hex(8)}.part")
        self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._part.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self.size += len(data)

    def publish(self) -> None:
        """Put the file in its place."""
        os.fchmod(self._fd, self._mode)
        if self._mtime is not None:
            os.utime(self._fd, (self._mtime, self._mtime))
        try:
            self._part.replace(self._destination)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            # A file that is itself a mount point (`--bind file:file`) can't be replaced, only rewritten.
            shutil.copyfile(self._part, self._destination)


def _existing_mode(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError:
        return _FILE_MODE
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Path is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Path is not a regular file")
    return stat.S_IMODE(status.st_mode)


def _make_parents(directory: Path) -> None:
    """Missing parents with mode 0755: they are the user's, not the server's, whose umask is 077."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another upload made it meanwhile
            one.mkdir()
            one.chmod(_DIRECTORY_MODE)
