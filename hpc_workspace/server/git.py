"""What changed in a repository, in the shapes of OpenHands' `/api/git`. Uses the image's git."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hpc_workspace.server.children import run_program
from hpc_workspace.server.requests import RequestError

_TIMEOUT_S = 60.0
# The tree of a repository without a commit (git hash-object -t tree /dev/null).
_EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
_STATUS = {"A": "ADDED", "D": "DELETED", "M": "UPDATED", "T": "UPDATED", "R": "MOVED", "C": "ADDED"}


def routes(environment: Mapping[str, str]) -> list[Route]:
    git = _Git(environment)
    return [Route("/api/git/changes", git.changes), Route("/api/git/diff", git.diff)]


class _Git:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {**environment, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}

    async def changes(self, request: Request) -> Response:
        """Files that differ from HEAD (or `ref`), untracked ones too; empty where there is no repository."""
        path = Path(request.query_params.get("path", "/"))
        if await self._top(path) is None:
            return JSONResponse([])
        base = await self._base(path, request.query_params.get("ref"))
        listed = await self._run(path, "diff", "--name-status", "-z", "--no-renames", "--relative", base)
        fields = listed.split(b"\0")
        found = {
            _name(name): _STATUS.get(status.decode()[:1], "UPDATED")
            for status, name in zip(fields[0::2], fields[1::2], strict=False)
        }
        untracked = await self._run(path, "ls-files", "-z", "--others", "--exclude-standard")
        found |= {_name(name): "ADDED" for name in untracked.split(b"\0") if name}
        return JSONResponse([{"status": found[name], "path": name} for name in sorted(found)])

    async def diff(self, request: Request) -> Response:
        """One file before (at HEAD or `ref`) and after; null where it did not or does not exist."""
        path = Path(request.query_params.get("path", "/"))
        top = await self._top(path.parent)
        if top is None:
            return JSONResponse({"modified": None, "original": None})
        base = await self._base(path.parent, request.query_params.get("ref"))
        relative = os.path.relpath(os.path.realpath(path), os.path.realpath(top))
        code, original, _ = await self._try(path.parent, "show", f"{base}:{relative}")
        modified = path.read_bytes() if path.is_file() else None
        return JSONResponse({"modified": _text(modified), "original": _text(original) if code == 0 else None})

    async def _top(self, path: Path) -> str | None:
        code, out, _ = await self._try(path, "rev-parse", "--show-toplevel")
        return os.fsdecode(out).rstrip("\n") if code == 0 else None

    async def _base(self, path: Path, ref: str | None) -> str:
        code, out, error = await self._try(path, "rev-parse", "--verify", "--quiet", "--end-of-options", ref or "HEAD")
        if code == 0:
            return out.decode().strip()
        if ref:
            raise RequestError(f"{ref!r} names no commit: {error.decode(errors='replace')}", 400)
        return _EMPTY_TREE

    async def _run(self, path: Path, *arguments: str) -> bytes:
        code, out, error = await self._try(path, *arguments)
        if code != 0:
            raise RequestError(f"git {arguments[0]} failed: {error.decode(errors='replace').strip()}", 400)
        return out

    async def _try(self, path: Path, *arguments: str) -> tuple[int, bytes, bytes]:
        if not path.is_dir():
            raise RequestError(f"{path} is not a directory", 400)
        # The repository may belong to another user of the container (root inside, files from a bind mount).
        argv = ["git", "-c", "safe.directory=*", *arguments]
        try:
            return await run_program(argv, cwd=str(path), env=self._environment, timeout_s=_TIMEOUT_S)
        except FileNotFoundError as error:
            raise RequestError("there is no git in this image", 501) from error
        except TimeoutError as error:
            raise RequestError(f"git {arguments[0]} took longer than {_TIMEOUT_S:g} s", 504) from error


def _name(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "replace")
