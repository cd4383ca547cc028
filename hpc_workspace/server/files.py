"""/api/file: files and directories both ways, streamed; what is uploaded appears whole or not at all.

Data goes to a temporary file or directory beside its destination, never through /tmp (often 64 MiB in a container).
`upload` and `download` are as OpenHands' server has them. The rest is for our own client: `raw`, with modes, times,
directories as archives (`tarstream`), and transfers that go on where they were cut.
"""

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hpc_workspace.server import newfile
from hpc_workspace.server.newfile import NewFile
from hpc_workspace.server.requests import RequestError, parse_id
from hpc_workspace.server.tarstream import ArchiveError
from hpc_workspace.server.trees import (
    CHUNK_BYTES,
    ChangedError,
    NewTree,
    adopt_tree,
    gathered,
    pack,
    read_file,
    scan,
    version_of,
)
from hpc_workspace.server.uploads import New, SupersededError, Upload, Uploads, Verdict

# How long what has arrived of an upload is kept for its client to come back: longer than it tries to.
_LINGER_S = 120.0
_NS = 10**9
# The last byte of what `raw` gives: whether the source was the same until the end.
_SAME, _CHANGED = b"=", b"!"


def file_routes() -> list[Route]:
    """The routes, over one table of uploads."""
    uploads = Uploads()

    async def put_raw(request: Request) -> Response:
        return await _put_raw(request, uploads)

    async def look(request: Request) -> Response:
        return _look_at_upload(request, uploads)

    async def drop(request: Request) -> Response:
        return await _drop_upload(request, uploads)

    return [
        Route("/api/file/upload", _upload, methods=["POST"]),
        Route("/api/file/download", _download, methods=["GET"]),
        Route("/api/file/raw", put_raw, methods=["PUT"]),
        Route("/api/file/raw", _get_raw, methods=["GET"]),
        Route("/api/file/uploads/{id}", look, methods=["GET"]),
        Route("/api/file/uploads/{id}", drop, methods=["DELETE"]),
        Route("/api/file/stat", _stat, methods=["GET"]),
        Route("/api/file/publish", _publish, methods=["POST"]),
    ]


async def _upload(request: Request) -> Response:
    from hpc_workspace.server.multipart import file_part

    path = _path_of(_query_of(request))
    with _as_bad_request(path):
        new = await asyncio.to_thread(NewFile, path, None, None)
        try:
            async for piece in _gathered(file_part(request.headers.get("content-type", ""), request.stream())):
                await asyncio.to_thread(new.write, piece)
            await asyncio.to_thread(new.publish)
        finally:
            await asyncio.to_thread(new.discard)
    return JSONResponse({"success": True, "file_size": new.size})


@dataclass(frozen=True)
class _Put:
    """What a PUT says of itself.

    Attributes:
        upload_id: the client's own; None: an upload that is cut is lost.
        offset: how many bytes earlier requests have brought.
        total: how many it will be in all; None: not said.
    """

    path: Path
    kind: str
    mode: int | None
    mtime_ns: int | None
    upload_id: str | None
    offset: int
    total: int | None
    linger_s: float

    def make(self) -> New:
        if self.kind == "directory":
            return NewTree(self.path)
        return NewFile(self.path, self.mode, self.mtime_ns)


def _parse_put(query: dict[str, str]) -> _Put:
    try:
        mode = int(query["mode"], 8) if "mode" in query else None
        mtime_ns = int(query["mtime_ns"]) if "mtime_ns" in query else None
        if "mtime" in query:
            mtime_ns = round(float(query["mtime"]) * _NS)
        offset, total = int(query.get("offset", "0")), int(query["total"]) if "total" in query else None
        linger_s = min(float(query.get("linger_s", _LINGER_S)), 3600.0)
    except (ValueError, OverflowError) as error:
        raise RequestError(f"mode must be octal, offset, total and times numbers: {error}") from error
    if mode is not None and not 0 <= mode <= 0o7777:
        raise RequestError(f"mode {query['mode']} is not a file mode")
    kind = query.get("kind", "file")
    if kind not in ("file", "directory"):
        raise RequestError("kind must be file or directory")
    upload_id = parse_id(query["upload"]) if "upload" in query else None
    return _Put(_path_of(query), kind, mode, mtime_ns, upload_id, offset, total, linger_s)


async def _put_raw(request: Request, uploads: Uploads) -> Response:
    put = _parse_put(_query_of(request))
    upload = uploads.find(put.upload_id) if put.upload_id is not None else None
    if upload is None:
        upload = await _begin(put, uploads)
    turn = upload.take_over()
    if put.offset != upload.new.received:
        raise RequestError(f"{upload.new.received} bytes have arrived, not {put.offset}", 409)
    try:
        with _as_bad_request(put.path):
            async for piece in _gathered(request.stream()):
                await asyncio.to_thread(upload.write, turn, piece)
            if put.total is not None and put.total != upload.new.received:
                raise RequestError(f"{upload.new.received} bytes came, of {put.total}", 400)
            await asyncio.to_thread(upload.publish, turn)
    except SupersededError:
        raise RequestError("another request goes on with this upload", 409) from None
    except RequestError as error:
        if put.upload_id is not None:
            if isinstance(error.__cause__, ClientDisconnect):
                uploads.rest(put.upload_id)
                raise
            uploads.end(put.upload_id, Verdict(error.status, str(error)))
        await asyncio.to_thread(upload.discard)
        raise
    if put.upload_id is not None:
        uploads.end(put.upload_id, Verdict(200, size=upload.new.size))
    await asyncio.to_thread(upload.discard)
    return JSONResponse({"success": True, "file_size": upload.new.size})


async def _begin(put: _Put, uploads: Uploads) -> Upload:
    """A new upload. Why there can be none is kept too: a client that is still sending may not get the answer."""
    if put.offset:
        raise RequestError("nothing is known of what has arrived before", 409)
    try:
        with _as_bad_request(put.path):
            upload = Upload(await asyncio.to_thread(put.make), put.linger_s)
    except RequestError as error:
        if put.upload_id is not None:
            uploads.end(put.upload_id, Verdict(error.status, str(error)))
        raise
    if put.upload_id is not None:
        uploads.add(put.upload_id, upload)
    return upload


def _look_at_upload(request: Request, uploads: Uploads) -> Response:
    upload_id = parse_id(request.path_params["id"])
    if (verdict := uploads.verdict(upload_id)) is not None:
        return JSONResponse({"status": verdict.status, "detail": verdict.detail, "file_size": verdict.size})
    if (upload := uploads.find(upload_id)) is None:
        raise RequestError("there is no such upload", 404)
    upload.take_over()  # what an earlier connection still brings comes too late
    uploads.rest(upload_id)
    return JSONResponse({"offset": upload.new.received})


async def _drop_upload(request: Request, uploads: Uploads) -> Response:
    upload_id = parse_id(request.path_params["id"])
    if (upload := uploads.find(upload_id)) is not None:
        uploads.end(upload_id, Verdict(409, "its client gave it up"))
        await asyncio.to_thread(upload.discard)
    return JSONResponse({"success": True})


async def _download(request: Request) -> Response:
    path = _path_of(_query_of(request))
    fd, status = await asyncio.to_thread(_open, path)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise RequestError(f"{_shown(path)} is not a regular file", 400)
    headers = {
        "content-length": str(status.st_size),
        "content-disposition": f"attachment; filename*=utf-8''{quote(os.fsencode(path.name))}",
        "x-file-mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "x-file-mtime": f"{status.st_mtime_ns / _NS:.9f}",
    }
    content = _streamed(fd, lambda: read_file(fd, status))
    return StreamingResponse(content, media_type="application/octet-stream", headers=headers)


async def _get_raw(request: Request) -> Response:
    """A file, or a directory as an archive, from byte `offset` on; then one byte that says whether it stayed the same.

    With `version`, 412 if it is another than that. With `most`, nothing of what is longer, but all that is told of it.
    """
    query = _query_of(request)
    path = _path_of(query)
    try:
        offset, most = int(query.get("offset", "0")), int(query["most"]) if "most" in query else None
    except ValueError:
        raise RequestError("offset and most must be numbers of bytes") from None
    fd, status = await asyncio.to_thread(_open, path)
    headers = {
        "x-file-mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "x-file-mtime-ns": str(status.st_mtime_ns),
        "x-file-kind": "directory" if stat.S_ISDIR(status.st_mode) else "file",
    }
    pieces: Callable[[], Iterator[bytes]]
    try:
        if stat.S_ISDIR(status.st_mode):
            with _as_bad_request(path, "read"):
                found = await asyncio.to_thread(scan, fd)
            version, size, content_bytes = found.version, found.archive_bytes, found.file_bytes
            headers["x-left-out"] = "/".join(quote(os.fsencode(name), safe="") for name in found.left_out)
            pieces = lambda: gathered(pack(fd, version, offset))  # noqa: E731 - one of two
        elif stat.S_ISREG(status.st_mode):
            version, size, content_bytes = version_of(status), status.st_size, status.st_size
            pieces = lambda: read_file(fd, status, offset)  # noqa: E731
        else:
            raise RequestError(f"{_shown(path)} is not a regular file", 400)
        if query.get("version", version) != version:
            raise RequestError(f"{_shown(path)} has changed", 412)
        if not 0 <= offset <= size:
            raise RequestError(f"{_shown(path)} has {size} bytes", 416)
    except BaseException:
        os.close(fd)
        raise
    headers |= {"x-file-version": version, "x-file-size": str(size), "x-file-bytes": str(content_bytes)}
    if most is not None and size - offset > most:
        os.close(fd)
        return Response(headers=headers)
    headers["content-length"] = str(size - offset + len(_SAME))
    content = _streamed(fd, lambda: _sealed(pieces(), size - offset))
    return StreamingResponse(content, media_type="application/octet-stream", headers=headers)


def _sealed(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The pieces, filled up to `size` if they stop before, and the byte that says whether they are what they should."""
    try:
        for piece in pieces:
            size -= len(piece)
            if size < 0:
                raise ChangedError("it has grown")
            yield piece
    except (ChangedError, OSError):
        while size > 0:
            yield bytes(min(size, CHUNK_BYTES))
            size -= min(size, CHUNK_BYTES)
        yield _CHANGED
    else:
        yield _SAME


async def _streamed(fd: int, make: Callable[[], Iterator[bytes]]) -> AsyncIterator[bytes]:
    """The pieces, each read in a worker thread; `fd` is closed when it is over, however that is."""
    done = object()
    with os.fdopen(fd, "rb", buffering=0) if stat.S_ISREG(os.fstat(fd).st_mode) else _closing(fd):
        pieces = make()
        while (piece := await asyncio.to_thread(next, pieces, done)) is not done:
            assert isinstance(piece, bytes)
            yield piece


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _open(path: Path) -> tuple[int, os.stat_result]:
    """The file or directory, open.

    Raises:
        RequestError: 404, 403
    """
    with _as_bad_request(path, "read"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return fd, os.fstat(fd)


async def _stat(request: Request) -> Response:
    """What is at a path, links followed. With `scan`, a directory's version too: it is read as for its archive."""
    query = _query_of(request)
    path = _path_of(query)

    def look() -> dict[str, Any]:
        with _as_bad_request(path, "read"):
            status = path.stat()
            kind = "directory" if stat.S_ISDIR(status.st_mode) else "file" if stat.S_ISREG(status.st_mode) else "other"
            version = version_of(status)
            if kind == "directory" and "scan" in query:
                fd, _ = _open(path)
                try:
                    version = scan(fd).version
                finally:
                    os.close(fd)
        return {
            "kind": kind,
            "size": status.st_size,
            "mode": stat.S_IMODE(status.st_mode),
            "mtime_ns": status.st_mtime_ns,
            "ino": status.st_ino,
            "version": version,
        }

    return JSONResponse(await asyncio.to_thread(look))


async def _publish(request: Request) -> Response:
    """Put `part`, written aside by a client that sees the same disk, in its place. 410: it does not lie there."""
    query = _query_of(request)
    put = _parse_put(query)
    part = _path_of(query, "part")
    if not await asyncio.to_thread(os.path.lexists, part):
        raise RequestError(f"{_shown(part)} is not there", 410)
    with _as_bad_request(put.path):
        try:
            await asyncio.to_thread(_adopt, part, put)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise RequestError(f"{_shown(part)} is on another disk than {_shown(put.path)}", 410) from error
    return JSONResponse({"success": True})


def _adopt(part: Path, put: _Put) -> None:
    if put.kind == "directory":
        adopt_tree(part, put.path)
    else:
        _adopt_file(part, put)


def _adopt_file(part: Path, put: _Put) -> None:
    new = NewFile(put.path, put.mode, put.mtime_ns)
    new.discard()
    fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or (put.total is not None and status.st_size != put.total):
            raise OSError(errno.EIO, "what lies aside is not what was written")
        os.fchmod(fd, new.mode)
        if put.mtime_ns is not None:
            os.utime(fd, ns=(put.mtime_ns, put.mtime_ns))
    finally:
        os.close(fd)
    newfile.replace(part, new.destination)
    part.unlink(missing_ok=True)  # copied, where the destination is a mount point


def _query_of(request: Request) -> dict[str, str]:
    """The query; bytes that are not UTF-8 as lone surrogates, which Starlette's own would replace."""
    text = request.scope["query_string"].decode("latin-1")
    return dict(parse_qsl(text, keep_blank_values=True, errors="surrogateescape"))


def _path_of(query: dict[str, str], name: str = "path") -> Path:
    text = query.get(name)
    if text is None:
        raise RequestError(f"{name} is missing")
    if "\0" in text or not text.startswith("/"):
        raise RequestError("Path must be absolute", 400)
    return Path(text)


async def _gathered(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in larger pieces: each costs one hop to a thread. What came before a cut is given too."""
    held = bytearray()
    try:
        async for chunk in chunks:
            held += chunk
            if len(held) >= CHUNK_BYTES:
                yield bytes(held)
                held.clear()
    except ClientDisconnect:
        if held:
            yield bytes(held)
        raise
    if held:
        yield bytes(held)


def _shown(path: Path) -> str:
    """A path for an answer, which is UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


_STATUS = {
    errno.ENOENT: 404,
    errno.ENOSPC: 507,
    errno.EDQUOT: 507,
    errno.EFBIG: 507,
    errno.EACCES: 403,
    errno.EPERM: 403,
    errno.EROFS: 403,
}


@contextlib.contextmanager
def _as_bad_request(path: Path, verb: str = "written") -> Iterator[None]:
    try:
        yield
    except ClientDisconnect as error:
        raise RequestError("the client went away during the upload", 400) from error
    except ArchiveError as error:
        raise RequestError(f"{_shown(path)}: of the archive, {error.member!r} is refused: {error}", 400) from error
    except OSError as error:
        what = f"{_shown(path)} does not exist" if error.errno == errno.ENOENT and verb == "read" else ""
        below = f" (at {error.filename!r})" if error.filename not in (None, str(path)) else ""
        what = what or f"{_shown(path)} can't be {verb}: {error.strerror}{below}"
        raise RequestError(f"{what} [Errno {error.errno or 0}]", _STATUS.get(error.errno or 0, 400)) from error
