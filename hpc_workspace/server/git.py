"""/api/git: what changed against a base, and one file's two sides. Semantics as upstream's sdk/git 1.58.

Differences: output is read NUL-separated, so that blanks, tabs and non-ASCII in names are right; a base is never looked
up over the network. The git is the image's own, else the toolbox's, else the answer is 501. Both refuse a repository of
another user (safe.directory), which then counts as none.
"""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hpc_workspace.server import layout
from hpc_workspace.server.children import run_program
from hpc_workspace.server.requests import RequestError

_TIMEOUT_S = 30.0
# A repository's configuration must not have programs run for it that only look after git's speed.
_OPTIONS = ("--no-pager", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
_MAX_FILE_BYTES = 1024 * 1024
# The hash of the tree without entries, the same in every SHA-1 repository.
_EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
_STATUS_WORDS = {"M": "UPDATED", "A": "ADDED", "D": "DELETED", "U": "UPDATED", "T": "UPDATED"}


class GitFailedError(Exception):
    """Git ended with an error; the message is what it said."""


def git_routes(environment: Callable[[], dict[str, str]], toolbox: str | None = None) -> list[Route]:
    """The routes.

    Args:
        environment: gives what commands find in their environment.
        toolbox: the toolbox's root, where there is one.
    """

    async def changes(request: Request) -> Response:
        path, ref = _parameters(request)
        try:
            return JSONResponse(await changes_below(find_git(environment(), toolbox), path, ref))
        except GitFailedError as error:
            raise RequestError(str(error), 400) from error

    async def diff(request: Request) -> Response:
        path, ref = _parameters(request)
        try:
            return JSONResponse(await diff_of(find_git(environment(), toolbox), path, ref))
        except GitFailedError as error:
            raise RequestError(str(error), 400) from error

    async def program(_: Request) -> Response:
        git = find_git(environment(), toolbox)
        return JSONResponse({"argv": git.argv, "environment": git.additions})

    return [
        Route("/api/git/changes", changes, methods=["GET"]),
        Route("/api/git/diff", diff, methods=["GET"]),
        Route("/api/git/program", program, methods=["GET"]),
    ]


def _parameters(request: Request) -> tuple[Path, str | None]:
    path, ref = request.query_params.get("path"), request.query_params.get("ref")
    if not path or "\0" in path:
        raise RequestError("path is missing")
    if ref is not None and (ref.startswith("-") or "\0" in ref):
        raise RequestError(f"{ref!r} is not a git ref", 400)
    return Path(path), ref


def find_git(environment: Mapping[str, str], toolbox: str | None) -> "Git":
    """The image's git, if commands find one on their PATH; else the toolbox's (looked for anew: one may be installed).

    Raises:
        RequestError: 501: there is neither.
    """
    if shutil.which("git", path=environment.get("PATH", os.defpath)):
        return Git(["git"], environment)
    if toolbox is None:
        raise RequestError("git is not installed in this image", 501)
    if not Path(toolbox, layout.GIT, "bin/git").exists():
        raise RequestError(
            "git is not installed in this image, and not on the machine where the toolbox was made either", 501
        )
    # Nothing of the machine that git is from: no system configuration, no place for its programs.
    additions = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_EXEC_PATH": f"{toolbox}/{layout.GIT_PROGRAMS}"}
    return Git(layout.git_argv(toolbox), _environment_of_toolbox_git(environment), additions)


def _environment_of_toolbox_git(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what is not for a program that is brought along.

    LD_PRELOAD and LD_AUDIT name libraries of the image, which are not for the toolbox's loader; LD_LIBRARY_PATH does
    not reach git, and stays for the filters that it may start. Source: git(1), ld.so(8).
    """
    return {name: value for name, value in environment.items() if name not in ("LD_PRELOAD", "LD_AUDIT")}


class Git:
    """Runs git in one environment: no pager, no prompt, no optional locks.

    Args:
        argv: starts it, up to its own arguments.
        additions: what it must find in its environment besides.
    """

    def __init__(self, argv: list[str], environment: Mapping[str, str], additions: Mapping[str, str] = {}) -> None:
        self.argv = argv
        self.additions = dict(additions)
        fixed = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        self._environment = {**environment, **additions, **fixed}

    async def __call__(self, directory: Path, *words: str) -> bytes:
        argv = [*self.argv, *_OPTIONS, *words]
        try:
            code, out, err = await run_program(argv, cwd=str(directory), env=self._environment, timeout_s=_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            if not directory.is_dir():
                raise GitFailedError(f"{directory} is not a directory") from error
            raise GitFailedError(f"git {words[0]} in {directory}: {error or 'no answer in 30 s'}") from error
        if code != 0:
            raise GitFailedError(f"git {words[0]} in {directory}: {err.decode('utf-8', 'replace').strip()}")
        return out

    async def try_line(self, directory: Path, *words: str) -> str | None:
        """The one line of the answer; None where git fails or says nothing."""
        try:
            return os.fsdecode(await self(directory, *words)).strip() or None
        except GitFailedError:
            return None


async def changes_below(git: Git, directory: Path, ref: str | None) -> list[dict[str, str]]:
    """Changes in the repository at `directory` and in those directly below it; empty where there is none."""
    changes = await _changes_in(git, directory, ref) if await _is_repository(git, directory) else []
    for nested in await asyncio.to_thread(_nested_repositories, directory):
        changes = [change for change in changes if not Path(change["path"]).is_relative_to(nested)]
        if await _is_repository(git, directory / nested):
            inner = await _changes_or_none(git, directory / nested, ref)
            changes += [{**change, "path": f"{nested}/{change['path']}"} for change in inner]
    return sorted(changes, key=lambda change: change["path"])


def _nested_repositories(directory: Path) -> list[str]:
    # Hidden directories are left out, as upstream's glob does.
    return [marker.parent.name for marker in directory.glob("*/.git") if not marker.parent.name.startswith(".")]


async def _changes_or_none(git: Git, directory: Path, ref: str | None) -> list[dict[str, str]]:
    try:
        return await _changes_in(git, directory, ref)
    except GitFailedError:  # a ref of the outer repository need not exist in a nested one
        return []


async def _changes_in(git: Git, directory: Path, ref: str | None) -> list[dict[str, str]]:
    base = await _base(git, directory, ref)
    options = ("--name-status", "-z", "--no-renames", "--relative", "--no-ext-diff", "--ignore-submodules=dirty")
    listed = await git(directory, "diff", *options, base)
    untracked = await git(directory, "ls-files", "-z", "--others", "--exclude-standard")
    changes = [
        {"status": _STATUS_WORDS.get(status[:1], "UPDATED"), "path": path} for status, path in _pairs(_names(listed))
    ]
    return changes + [{"status": "ADDED", "path": path} for path in _names(untracked)]


def _names(output: bytes) -> list[str]:
    # A name that is not UTF-8 has no place in JSON; it is shown with replacement characters.
    return [name.decode("utf-8", "replace") for name in output.split(b"\0") if name]


def _pairs(items: list[str]) -> Iterator[tuple[str, str]]:
    return zip(items[::2], items[1::2], strict=True)


async def diff_of(git: Git, path: Path, ref: str | None) -> dict[str, Any]:
    """`original` and `modified` text of one file; both null outside a repository.

    Raises:
        GitFailedError: It is too large, or exists neither here nor at the base.
    """
    path = Path(os.path.realpath(path))
    is_deleted = not path.exists()
    if not is_deleted:
        _require_small(path.stat().st_size)
    root = await _root_of(git, path)
    if root is None:
        if is_deleted:
            raise GitFailedError(f"File does not exist: {path}")
        return {"modified": None, "original": None}
    base = await _base(git, root, ref)
    original = await _blob(git, root, f"{base}:{path.relative_to(root).as_posix()}")
    if original is None and is_deleted:
        raise GitFailedError(f"File does not exist: {path}")
    modified = b"" if is_deleted else await asyncio.to_thread(path.read_bytes)
    return {"modified": _as_lines(modified, "ignore-binary"), "original": _as_lines(original or b"", "replace")}


async def _root_of(git: Git, path: Path) -> Path | None:
    directory = path.parent
    while not directory.is_dir():
        directory = directory.parent
    top = await git.try_line(directory, "rev-parse", "--show-toplevel")
    return Path(os.path.realpath(top)) if top else None


async def _blob(git: Git, root: Path, name: str) -> bytes | None:
    size = await git.try_line(root, "cat-file", "-s", name)
    if size is None or await git.try_line(root, "cat-file", "-t", name) != "blob":
        return None
    _require_small(int(size))
    return await git(root, "cat-file", "blob", name)


def _require_small(size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise GitFailedError(f"File too large for git diff: {size} bytes (max: {_MAX_FILE_BYTES} bytes)")


def _as_lines(data: bytes, errors: str) -> str:
    """Upstream's normal form: lines joined by newline, none at the end; a binary file on disk shows as empty."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        if errors == "ignore-binary":
            return ""
        text = data.decode("utf-8", errors)
    return "\n".join(text.splitlines())


async def _is_repository(git: Git, directory: Path) -> bool:
    if not directory.is_dir():
        return False
    return await git.try_line(directory, "rev-parse", "--git-dir") is not None


async def _base(git: Git, directory: Path, ref: str | None) -> str:
    """The commit to compare with: `ref`, or what best shows the work done here, pushed or not."""
    if ref is None:
        return await _display_base(git, directory)
    commit = await _commit(git, directory, ref)
    if commit is None and ref == "HEAD":
        return _EMPTY_TREE
    if commit is None:
        raise GitFailedError(f"git rev-parse in {directory}: {ref} is no commit here")
    return commit


async def _commit(git: Git, directory: Path, ref: str) -> str | None:
    return await git.try_line(directory, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")


async def _display_base(git: Git, directory: Path) -> str:
    head = await _commit(git, directory, "HEAD")
    if head is None:
        return _EMPTY_TREE
    branch = await git.try_line(directory, "symbolic-ref", "--short", "--quiet", "HEAD")
    upstream = await _commit(git, directory, f"refs/remotes/origin/{branch}") if branch else None
    if upstream and (upstream != head or await _has_tracked_changes(git, directory)):
        return upstream
    return await _fork_point(git, directory, branch) or head


async def _has_tracked_changes(git: Git, directory: Path) -> bool:
    return await git.try_line(directory, "status", "--porcelain", "--untracked-files=no") is not None


async def _fork_point(git: Git, directory: Path, branch: str | None) -> str | None:
    """Where this branch left origin's default branch, else the local main or master."""
    default = await git.try_line(directory, "rev-parse", "--abbrev-ref", "--verify", "--quiet", "origin/HEAD")
    if default is not None:
        return await git.try_line(directory, "merge-base", "HEAD", default) or await _commit(git, directory, default)
    for name in ("main", "master"):
        tip = await _commit(git, directory, f"refs/heads/{name}")
        if tip is not None:
            is_ancestor = name != branch and await git.try_line(directory, "merge-base", "HEAD", tip) == tip
            return tip if is_ancestor else None
    return None
