"""Files by the bundled server's own routes: modes, times, directories, and transfers that go on where they were cut."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from hpc_workspace import clock
from hpc_workspace.client.bulk import BulkResponse
from hpc_workspace.client.calls import Caller, Patience, parse_json
from hpc_workspace.client.failures import as_file_error, changed_error, note, until_unchanged
from hpc_workspace.client.local import Found, Landing, Progress, Source, told
from hpc_workspace.client.shared import NotSharedError
from hpc_workspace.errors import (
    ServerResponseError,
    ServerUnavailableError,
    TunnelError,
    TunnelLostError,
    WorkspaceError,
)

COPY_BYTES = 1024 * 1024
# What is larger gets a connection of its own.
_SMALL_BYTES = 2 * COPY_BYTES
_GONE, _NOT_SHARED, _CHANGED = 404, 410, 412
_SAME = b"="


def url(route: str, **query: object) -> str:
    """A route with its query; paths may have any bytes, lone surrogates for those that are not UTF-8."""
    return f"{route}?" + "&".join(f"{key}={quote(os.fsencode(str(value)), safe='')}" for key, value in query.items())


class RawFiles:
    """Moves files by `caller`, whose server is the bundled one. Paths are absolute."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def put(self, source: Source, path: str, on_progress: Progress) -> None:
        """Bring a file or a directory to `path`.

        Raises:
            FileError: our disk, or the workspace's, says no; nothing of it was left.
            ServerError, TunnelError
        """
        upload_id = uuid.uuid4().hex
        patience = Patience()
        call_began_s = clock.now_s()
        offset = 0
        try:
            while offset >= 0:
                began_s = clock.now_s()
                try:
                    self._put_rest(source, path, upload_id, offset, on_progress, call_began_s)
                except (TunnelError, ServerUnavailableError) as error:
                    if (found := self._look(path, upload_id, error, patience, began_s)) < 0:
                        break
                    if found > offset:
                        patience.renew()
                    offset = found
                else:
                    break
        except (TunnelError, ServerUnavailableError):
            raise  # there is no way to tell: the server removes by itself what nobody goes on with
        except WorkspaceError:
            self._drop(upload_id)
            raise
        on_progress(source.size or source.content_bytes, source.size)

    def _put_rest(
        self,
        source: Source,
        path: str,
        upload_id: str,
        offset: int,
        on_progress: Progress,
        call_began_s: float,
    ) -> None:
        query: dict[str, object] = {"path": path, "kind": source.kind, "upload": upload_id, "offset": offset}
        query["mode"] = f"{source.mode:04o}"
        headers = {}
        if source.mtime_ns is not None:
            query["mtime_ns"] = source.mtime_ns
        if source.size is not None:
            query["total"] = source.size
            headers["Content-Length"] = str(source.size - offset)

        def body() -> dict[str, Any]:
            return {"content": told(source, offset, path, on_progress)}

        try:
            self._caller.send(
                "PUT",
                url("/api/file/raw", **query),
                headers=headers,
                content_of=body,
                is_repeatable=False,
                call_began_s=call_began_s,
                answer_timeout_s=None,
            )
        except ServerResponseError as error:
            raise as_file_error(error, path, "written") from error

    def _look(self, path: str, upload_id: str, broke: WorkspaceError, patience: Patience, began_s: float) -> int:
        """How much of a cut upload has arrived; below zero: it is whole. Waits for a way to ask.

        Raises:
            WorkspaceError: `broke`, if it is not to go on; ServerFileError: why the server ended it.
        """
        patience.wait(broke, began_s)
        try:
            found = parse_json(self._caller.send("GET", f"/api/file/uploads/{upload_id}").content)
        except ServerResponseError as error:
            if error.status == _GONE:
                return 0  # nothing of it had arrived, or the server is another now
            raise
        if "offset" in found:
            return int(found["offset"])
        if found["status"] >= 400:
            refused = ServerResponseError("PUT", status=int(found["status"]), evidence=str(found["detail"]))
            raise as_file_error(refused, path, "written") from broke
        return -1

    def _drop(self, upload_id: str) -> None:
        """What has arrived is not wanted."""
        try:
            self._caller.send("DELETE", f"/api/file/uploads/{upload_id}", is_repeatable=False)
        except WorkspaceError as error:
            note(error)

    def get(self, path: str, make_landing: Callable[[Found], Landing], on_progress: Progress) -> tuple[Found, int]:
        """Bring the file or directory at `path` here. Returns what it is, and the bytes of its files.

        Raises:
            FileChangedError: it changes all the time.
            FileError: our disk, or the workspace's, says no; nothing of it was left.
            ServerError, TunnelError
        """
        return until_unchanged(lambda: self._get_unchanged(path, make_landing, on_progress))

    def _get_unchanged(
        self, path: str, make_landing: Callable[[Found], Landing], on_progress: Progress
    ) -> tuple[Found, int]:
        patience = Patience()
        call_began_s = clock.now_s()
        state = _Arriving(path, make_landing, on_progress)
        try:
            while True:
                began_s, before = clock.now_s(), state.received
                try:
                    self._get_rest(state, call_began_s)
                except (TunnelError, ServerUnavailableError) as error:
                    if state.received > before:
                        patience.renew()
                    patience.wait(error, began_s)
                else:
                    return state.publish()
        finally:
            state.discard()

    def _get_rest(self, state: _Arriving, call_began_s: float) -> None:
        query: dict[str, object] = {"path": state.path}
        if state.found is None:
            query["most"] = _SMALL_BYTES
        else:
            query |= {"offset": state.received, "version": state.found.version}
        began_s = clock.now_s()
        target = url("/api/file/raw", **query)
        try:
            if state.found is None:
                response = self._caller.send("GET", target, is_streamed=True, call_began_s=call_began_s)
                try:
                    state.begin(_parse_found(response.headers))
                    for piece in self._caller.guarded(response.iter_raw(COPY_BYTES), began_s):
                        state.take(piece)
                finally:
                    response.close()
                if not state.is_large:
                    return self._require_whole(state, began_s)
                query |= {"offset": 0, "version": state.version}
                del query["most"]
                target = url("/api/file/raw", **query)
            with BulkResponse(self._caller, target, call_began_s) as bulk:
                state.begin(_parse_found(bulk.headers))
                for piece in bulk.pieces():
                    state.take(piece)
        except ServerResponseError as error:
            if error.status == _CHANGED:
                raise changed_error(state.path) from error
            raise as_file_error(error, state.path, "read") from error
        return self._require_whole(state, began_s)

    def _require_whole(self, state: _Arriving, began_s: float) -> None:
        if not state.is_whole:
            cut = TunnelLostError("The connection ended in the middle of a file.")
            raise self._caller.explain(cut, began_s)

    def look(self, path: str, *, with_scan: bool = False) -> dict[str, Any]:
        """What is at `path`, links followed: kind, size, mode, mtime_ns, ino, version. Raises: ServerFileError."""
        query = {"path": path} | ({"scan": "1"} if with_scan else {})
        try:
            return self._caller.json("GET", url("/api/file/stat", **query))
        except ServerResponseError as error:
            raise as_file_error(error, path, "read") from error

    def identify(self, path: str, *, kind: str) -> str:
        """What is at `path`, as `SharedMount` knows it."""
        found = self.look(path, with_scan=kind == "directory")
        if kind == "directory":
            return str(found["version"])
        return f"{found['ino']} {found['size']} {found['mtime_ns']}"

    def publish(self, part: str, source: Source, path: str) -> None:
        """Put what lies at `part` at `path`. Raises: ServerFileError; NotSharedError: it is not there."""
        query: dict[str, object] = {"path": path, "part": part, "mode": f"{source.mode:04o}", "kind": source.kind}
        if source.mtime_ns is not None:
            query["mtime_ns"] = source.mtime_ns
        if source.kind == "file" and source.size is not None:
            query["total"] = source.size
        try:
            # A copy, where the disk is another: it may take its time.
            self._caller.send("POST", url("/api/file/publish", **query), answer_timeout_s=None)
        except ServerResponseError as error:
            if error.status == _NOT_SHARED:
                raise NotSharedError(error.evidence) from error
            raise as_file_error(error, path, "written") from error


class _Arriving:
    """A download under way: it may come over several connections."""

    def __init__(self, path: str, make_landing: Callable[[Found], Landing], on_progress: Progress) -> None:
        self.path = path
        self.found: Found | None = None
        self.is_whole = False
        self._make_landing = make_landing
        self._landing: Landing | None = None
        self._on_progress = on_progress

    @property
    def is_large(self) -> bool:
        """Whether it was told of, and none of it came."""
        return self.found is not None and self.found.size > _SMALL_BYTES and not self.received

    @property
    def version(self) -> str:
        return self.found.version if self.found is not None else ""

    @property
    def received(self) -> int:
        return self._landing.received if self._landing is not None else 0

    def begin(self, found: Found) -> None:
        """An answer has begun, the first one or another."""
        if self.found is None:
            self.found = found
            self._landing = self._make_landing(found)
        elif found.version != self.found.version:
            raise changed_error(self.path)

    def take(self, piece: bytes) -> None:
        """Take the next bytes; the last one of all says whether they are what they should be.

        Raises:
            FileChangedError: they are not.
        """
        assert self.found is not None
        assert self._landing is not None
        left = self.found.size - self._landing.received
        if left:
            self._landing.write(piece[:left] if len(piece) > left else piece)
            self._on_progress(self._landing.received, self.found.size)
        if len(piece) > left:
            self.is_whole = True
            if piece[left:] != _SAME:
                raise changed_error(self.path)

    def publish(self) -> tuple[Found, int]:
        """Put it in its place."""
        assert self.found is not None
        assert self._landing is not None
        self._landing.publish()
        return self.found, self._landing.size

    def discard(self) -> None:
        """Let go of it."""
        if self._landing is not None:
            self._landing.discard()


def _parse_found(headers: Any) -> Found:
    try:
        return Found(
            kind=headers["x-file-kind"],
            mode=int(headers["x-file-mode"], 8),
            mtime_ns=int(headers["x-file-mtime-ns"]),
            size=int(headers["x-file-size"]),
            content_bytes=int(headers["x-file-bytes"]),
            version=headers["x-file-version"],
            left_out=tuple(
                os.fsdecode(unquote_to_bytes(name)) for name in headers.get("x-left-out", "").split("/") if name
            ),
        )
    except (KeyError, ValueError) as error:
        raise ServerResponseError("GET /api/file/raw: the answer is none.", evidence=repr(error)) from error
