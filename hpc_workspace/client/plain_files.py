"""Files on OpenHands' server (1.58), which writes a file in place, and knows nothing of modes, times and directories.

What its API can't do a command does, with the image's own tools (sh, coreutils; tar and find of GNU for directories).
Bytes go to a file beside the destination, or come from where they are; names of any bytes are hidden from the API
behind a link in /tmp whose name is plain.
"""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from hpc_workspace import clock
from hpc_workspace.client.calls import Caller, Patience
from hpc_workspace.client.commands import Commands
from hpc_workspace.client.failures import (
    as_file_error,
    changed_error,
    note,
    refused_by_command,
    server_file_error,
    until_unchanged,
)
from hpc_workspace.client.local import Found, Landing, Progress, Source, told
from hpc_workspace.client.raw_files import COPY_BYTES, url
from hpc_workspace.client.shared import NotSharedError
from hpc_workspace.errors import (
    ServerFileError,
    ServerResponseError,
    ServerUnavailableError,
    TunnelError,
    TunnelLostError,
)

_NS = 10**9
_SHORT_S = 60.0
_LONG_S = 86400.0
# What our scripts end with, beside the programs' own codes.
_NOT_THERE, _IS_DIRECTORY, _IS_FILE, _IS_OTHER, _CHANGED, _NOT_SHARED = 81, 82, 83, 84, 85, 86
_HEAD = "export LC_ALL=C; umask 022; "
# `$p` becomes what a link leads to, `$l` a link in /tmp to the directory that it is in, made if missing.
_PREPARE = (
    'if [ -L "$p" ]; then p=$(readlink -f -- "$p"; printf x); p=${p%?x}; fi; '
    'd=$(dirname -- "$p"; printf x); d=${d%?x}; '
)
_LOOK = "stat -L -c '%f %s %i %.9Y %.9Z' -- \"$p\""


class PlainFiles:
    """Moves files by `caller`, with the help of `commands`. Paths are absolute."""

    def __init__(self, caller: Caller, commands: Commands) -> None:
        self._caller = caller
        self._commands = commands

    def put(self, source: Source, path: str, on_progress: Progress) -> None:
        """Bring a file or a directory to `path`. Raises: as `RawFiles.put`."""
        names = _Names(path)
        try:
            self._prepare(names, source.kind)
            self._send(source, names, path, on_progress)
            self._finish(names, source)
        except BaseException:
            self._clear(names)
            raise
        on_progress(source.size or source.content_bytes, source.size)

    def publish(self, part: str, source: Source, path: str) -> None:
        """Put what lies at `part` at `path`. Raises: ServerFileError; NotSharedError: it is not there."""
        names = _Names(path)
        try:
            self._prepare(names, source.kind)
            aside = names.tree if source.kind == "directory" else names.part
            self._run(
                f"[ -e {shlex.quote(part)} ] || exit {_NOT_SHARED}; mv -T -- {shlex.quote(part)} {aside}",
                path,
                "written",
                timeout_s=_LONG_S,
            )
            self._finish(names, source, is_unpacked=True)
        except BaseException:
            self._clear(names)
            raise

    def _prepare(self, names: _Names, kind: str) -> None:
        allowed = '[ -d "$p" ]' if kind == "directory" else '[ -f "$p" ]'
        self._run(
            f"{names.assign}{_PREPARE}"
            f'if [ -e "$p" ] && ! {allowed}; then [ -d "$p" ] && exit {_IS_DIRECTORY}; '
            f'[ -f "$p" ] && exit {_IS_FILE}; exit {_IS_OTHER}; fi; '
            f'mkdir -p -- "$d" && ln -s -- "$d" {names.link}',
            names.path,
            "written",
        )

    def _send(self, source: Source, names: _Names, path: str, on_progress: Progress) -> None:
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="upload"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        if source.size is not None:
            headers["Content-Length"] = str(len(head) + source.size + len(tail))

        def pieces() -> Iterator[bytes]:
            yield head
            yield from told(source, 0, path, on_progress)
            yield tail

        try:
            self._caller.send(
                "POST",
                url("/api/file/upload", path=names.part),
                headers=headers,
                content_of=lambda: {"content": pieces()},
                answer_timeout_s=None,
            )
        except ServerResponseError as error:
            raise as_file_error(error, path, "written") from error

    def _finish(self, names: _Names, source: Source, *, is_unpacked: bool = False) -> None:
        if source.kind == "directory":
            unpack = f"mkdir -m 700 -- {names.tree} && tar -xpf {names.part} -C {names.tree} --no-same-owner && "
            # A directory that is there already keeps its mode.
            into = (
                f"{'' if is_unpacked else unpack}"
                f'if [ -d "$p" ]; then m=$(stat -c %a -- "$p") && chmod "$m" {names.tree} && '
                f'cp -aT --remove-destination -- {names.tree} "$p" && rm -rf -- {names.tree}; '
                f'else mv -T -- {names.tree} "$p"; fi'
            )
            self._run(
                f"{names.assign}{_PREPARE}{into} && rm -f -- {names.part} {names.link}",
                names.path,
                "written",
                timeout_s=_LONG_S,
            )
            return
        touch = "" if source.mtime_ns is None else f"touch -d @{_seconds(source.mtime_ns)} -- {names.part} && "
        self._run(
            f"{names.assign}{_PREPARE}chmod {source.mode:04o} -- {names.part} && {touch}"
            f'mv -fT -- {names.part} "$p" && rm -f -- {names.link}',
            names.path,
            "written",
        )

    def _clear(self, names: _Names) -> None:
        """Leave nothing of a transfer. If that can't be told, it stays."""
        try:
            self._run(f"rm -rf -- {names.part} {names.tree}; rm -f -- {names.link}", names.path, "written")
        except (ServerResponseError, TunnelError, ServerUnavailableError) as error:
            note(error)

    def get(self, path: str, make_landing: Callable[[Found], Landing], on_progress: Progress) -> tuple[Found, int]:
        """Bring the file or directory at `path` here. Raises: as `RawFiles.get`."""
        return until_unchanged(lambda: self._get_unchanged(path, make_landing, on_progress))

    def _get_unchanged(
        self, path: str, make_landing: Callable[[Found], Landing], on_progress: Progress
    ) -> tuple[Found, int]:
        names = _Names(path)
        landing: Landing | None = None
        try:
            found = self.look(path, link=names.link)
            if found.kind == "directory":
                self._pack(names)
            landing = make_landing(found)
            self._receive(names.link, path, landing, on_progress)
            if found.kind == "file" and self.look(path).version != found.version:
                raise changed_error(path)
            landing.publish()
            return found, landing.size
        finally:
            if landing is not None:
                landing.discard()
            self._clear(names)

    def look(self, path: str, *, link: str = "") -> Found:
        """What is at `path`.

        Args:
            link: where to put a plain name for a file; empty: nowhere.

        Raises:
            ServerFileError: it is neither a file nor a directory, or not there.
        """
        names = _Names(path)
        hide = f' && if [ -f "$p" ]; then ln -s -- "$p" {link}; fi' if link else ""
        said = self._run(f'{names.assign}[ -e "$p" ] || exit {_NOT_THERE}; {_LOOK}{hide}', path, "read")
        words = said.split()
        mode = int(words[0], 16)
        kind = {0o100000: "file", 0o040000: "directory"}.get(mode & 0o170000)
        if kind is None:
            raise server_file_error(path, "read", "It is neither a file nor a directory.", status=400, number=0)
        size = int(words[1]) if kind == "file" else 0
        return Found(
            kind=kind,
            mode=mode & 0o777,
            mtime_ns=_nanoseconds(words[3]),
            size=size,
            content_bytes=size,
            version=" ".join(words),
        )

    def identify(self, path: str, *, kind: str) -> str:
        """What is at `path`, as `SharedMount` knows it; empty for a directory, whose content nobody can vouch for."""
        if kind == "directory":
            return ""
        _, size, number, mtime, _ = self.look(path).version.split()
        return f"{number} {size} {_nanoseconds(mtime)}"

    def _pack(self, names: _Names) -> None:
        """A directory as an archive in the container's /tmp, which is the node's disk."""
        special = r"! \( -type s -o -type p -o -type b -o -type c \)"
        self._run(
            f'{names.assign}cd -- "$p" && find . {special} -print0 | '
            "tar --format=posix --pax-option=delete=atime,delete=ctime --hard-dereference --null --no-recursion "
            f"-T - -cf {names.link}; c=$?; [ $c = 1 ] && exit {_CHANGED}; exit $c",
            names.path,
            "read",
            timeout_s=_LONG_S,
        )

    def _receive(self, where: str, path: str, landing: Landing, on_progress: Progress) -> None:
        """The content of the file `where`, over as many connections as it takes."""
        patience = Patience()
        call_began_s = clock.now_s()
        total: int | None = None
        version = ""
        while total is None or landing.received < total:
            began_s, before = clock.now_s(), landing.received
            headers = {"Range": f"bytes={before}-", "If-Range": version} if before else {}
            try:
                response = self._ask(where, path, headers, call_began_s)
                try:
                    if before and response.status_code != 206:
                        raise changed_error(path)
                    total = before + int(response.headers["content-length"])
                    version = response.headers.get("etag", "")
                    for piece in self._caller.guarded(response.iter_raw(COPY_BYTES), began_s):
                        landing.write(piece)
                        on_progress(landing.received, total)
                    if landing.received < total:
                        cut = TunnelLostError("The connection ended in the middle of a file.")
                        raise self._caller.explain(cut, began_s)
                finally:
                    response.close()
            except (TunnelError, ServerUnavailableError) as error:
                if landing.received > before:
                    patience.renew()
                patience.wait(error, began_s)
        on_progress(landing.received, total)

    def _ask(self, where: str, path: str, headers: dict[str, str], call_began_s: float) -> Any:
        try:
            return self._caller.send(
                "GET",
                url("/api/file/download", path=where),
                headers=headers,
                is_streamed=True,
                call_began_s=call_began_s,
            )
        except ServerResponseError as error:
            raise as_file_error(error, path, "read") from error

    def _run(self, script: str, path: str, verb: str, *, timeout_s: float = _SHORT_S) -> str:
        """What a script prints.

        Raises:
            ServerFileError: it failed.
            FileChangedError: it says that something changed.
        """
        ended = self._commands.execute(_HEAD + script, cwd="/", timeout_s=timeout_s, env=None)
        code = ended.exit_code
        if code == 0:
            return ended.stdout
        if code == _CHANGED:
            raise changed_error(path)
        if code == _NOT_SHARED:
            raise NotSharedError("the server does not see what was written")
        known = {
            _NOT_THERE: (404, 2, "There is no such file."),
            _IS_DIRECTORY: (400, 21, "Path is a directory"),
            _IS_FILE: (400, 20, "There is a file of this name."),
            _IS_OTHER: (400, 22, "Path is not a regular file"),
        }
        if code in known:
            status, number, what = known[code]
            raise server_file_error(path, verb, what, status=status, number=number)
        if code == 127:
            raise ServerFileError(
                "The image lacks a program that directories need.",
                path=path,
                status=400,
                evidence=ended.stderr,
                remedy="Install tar, find and coreutils in it, or run it with image=, which brings our server along.",
            )
        raise refused_by_command(path, verb, ended.stderr or f"It ended with exit code {code}.")


class _Names:
    """A path, and the plain names of one transfer.

    Attributes:
        assign: a piece of shell that makes `$p` the path.
        link: in /tmp: to the directory of the destination, to the source, or the archive made of it.
        part, tree: beside the destination, by way of the link.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.assign = f"p={_word(path)}; " if _is_text(path) else f"p=$(printf %b {_octal(path)}); p=${{p%x}}; "
        name = uuid.uuid4().hex
        self.link = f"/tmp/.hpc-workspace-{name}"  # noqa: S108 - the container's, 0700
        self.part = f"{self.link}/.{name[:16]}.part"
        self.tree = f"{self.link}/.{name[:16]}.tree"


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _word(path: str) -> str:
    return shlex.quote(path)


def _octal(path: str) -> str:
    """For printf's %b, with an x at the end, so that no newline is lost."""
    return "'" + "".join(f"\\0{byte:03o}" for byte in path.encode("utf-8", "surrogateescape")) + "x'"


def _seconds(time_ns: int) -> str:
    sign, value = ("-", -time_ns) if time_ns < 0 else ("", time_ns)
    return f"{sign}{value // _NS}.{value % _NS:09d}"


def _nanoseconds(text: str) -> int:
    whole, _, part = text.removeprefix("-").partition(".")
    value = int(whole) * _NS + int(part[:9].ljust(9, "0") or "0")
    return -value if text.startswith("-") else value
