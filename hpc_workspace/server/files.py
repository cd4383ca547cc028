"""Files: OpenHands' upload and download, and a raw upload that streams and keeps the mode. Whole at the destination."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from hpc_workspace.server.requests import RequestError

_COPY_BYTES = 1024 * 1024
_NEW_MODE = 0o644


def routes() -> list[Route]:
    return [
        Route("/api/file/upload", upload, methods=["POST"]),
        Route("/api/file/raw", put, methods=["PUT"]),
        Route("/api/file/download", download),
    ]


def _path(request: Request) -> Path:
    said = request.query_params.get("path", "")
    if not said.startswith("/") or "\0" in said:
        raise RequestError("Path must be absolute", 400)
    return Path(said)


async def upload(request: Request) -> Response:
    """A multipart upload with one part named `file`, as OpenHands' clients send it."""
    target = _path(request)
    async with request.form() as form:
        file = form.get("file")
        if file is None or isinstance(file, str):
            raise RequestError("the form has no file")

        async def pieces() -> AsyncIterator[bytes]:
            while data := await file.read(_COPY_BYTES):
                yield data

        size = await _write(target, pieces(), _NEW_MODE, None)
    return JSONResponse({"success": True, "file_size": size})


async def put(request: Request) -> Response:
    """The body itself is the file. `mode` is octal, `mtime` seconds since the epoch."""
    target = _path(request)
    try:
        mode = int(request.query_params.get("mode", f"{_NEW_MODE:o}"), 8) & 0o7777
        mtime = float(request.query_params["mtime"]) if "mtime" in request.query_params else None
    except ValueError as error:
        raise RequestError(f"mode is octal and mtime a number: {error}") from error
    size = await _write(target, request.stream(), mode, mtime)
    return JSONResponse({"success": True, "file_size": size})


async def _write(target: Path, pieces: AsyncIterator[bytes], mode: int, mtime: float | None) -> int:
    """Write beside `target`, then put it in place, so that nobody ever sees half of it. Returns the size."""
    aside = target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}.part"
    size = 0
    try:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if target.is_dir():
            raise RequestError("Path is a directory", 400)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                async for data in pieces:
                    await run_in_threadpool(_write_all, file.fileno(), data)
                    size += len(data)
                os.fchmod(file.fileno(), mode)
                if mtime is not None:
                    os.utime(file.fileno(), (mtime, mtime))
            aside.replace(target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except (FileExistsError, NotADirectoryError) as error:
        raise RequestError("A parent of the path is not a directory", 400) from error
    except OSError as error:
        raise RequestError(f"{target} can't be written: {error.strerror}", 507 if error.errno == 28 else 400) from error
    return size


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


async def download(request: Request) -> Response:
    """The file, streamed, with its mode and time in headers."""
    path = _path(request)
    try:
        found = path.stat()
    except OSError as error:
        raise RequestError("File not found", 404) from error
    if not stat.S_ISREG(found.st_mode):
        raise RequestError("Path is not a file", 400)
    if not os.access(path, os.R_OK):
        raise RequestError("File can't be read", 403)
    return FileResponse(
        path,
        media_type="application/octet-stream",
        headers={"X-File-Mode": f"{stat.S_IMODE(found.st_mode):04o}", "X-File-Mtime": repr(found.st_mtime)},
        stat_result=found,
    )
