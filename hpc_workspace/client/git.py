"""Git repositories of a workspace, through its agent server."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from typing import Any

from hpc_workspace.client import listing, patching
from hpc_workspace.client.calls import Caller
from hpc_workspace.client.commands import Commands
from hpc_workspace.client.files import Files
from hpc_workspace.errors import GitError, ServerResponseError
from hpc_workspace.results import GitChange, GitDiff

_LIST_S = 60.0
_PATCH_S = 900.0
_CLEAN_UP_S = 60.0
_BAD_REQUEST, _NOT_IMPLEMENTED = 400, 501


class Git:
    """Asks about repositories by `caller`; patches are made by `commands` and fetched by `files`."""

    def __init__(self, caller: Caller, commands: Commands, files: Files) -> None:
        self._caller = caller
        self._commands = commands
        self._files = files

    def changes(self, path: str) -> list[GitChange]:
        """The changed files of the repository at `path`; empty where there is none."""
        where = self._caller.absolute(path)
        if not self._caller.is_bundled:
            return self._list(where)
        with _git_errors(where):
            answer = self._caller.any_json("GET", "/api/git/changes", params={"path": where})
        return [GitChange.model_validate(item) for item in answer]

    def _list(self, where: str) -> list[GitChange]:
        listed = self._commands.execute(listing.listing(where), cwd="/", timeout_s=_LIST_S, env=None)
        if listed.exit_code == listing.NO_GIT:
            raise _no_git(where, listed.stderr)
        if listed.exit_code != 0 or listed.truncated:
            evidence = "More than 8 MiB of names." if listed.truncated else listed.stderr[-2000:].strip()
            raise GitError(f"git has no answer for {where}.", path=where, evidence=evidence)
        return listing.parse_listing(listed.stdout_bytes)

    def diff(self, path: str) -> GitDiff:
        """The file at `path` before and after."""
        where = self._caller.absolute(path)
        with _git_errors(where):
            return GitDiff.model_validate(self._caller.json("GET", "/api/git/diff", params={"path": where}))

    def patch(self, path: str) -> bytes:
        """All that changed in the repository at `path`, as one patch; see `Workspace.patch`."""
        where = self._caller.absolute(path)
        text = patching.patching(where, **self._program(where))
        made = self._commands.execute(text, cwd="/", timeout_s=_PATCH_S, env=None)
        if made.exit_code == patching.NO_GIT:
            raise _no_git(where, made.stderr)
        if made.exit_code == patching.NO_REPOSITORY:
            raise GitError(f"There is no repository at {where}.", path=where, evidence=made.stderr.strip())
        if made.exit_code != 0:
            late = "It took too long. " if made.timeout_occurred else ""
            raise GitError(
                f"git made no patch of {where}.", path=where, evidence=f"{late}{made.stderr[-2000:]}".strip()
            )
        folder = made.stdout.removesuffix("\n")
        try:
            return self._files.read(f"{folder}/patch")
        finally:
            self._commands.execute(f"rm -rf -- {shlex.quote(folder)}", cwd="/", timeout_s=_CLEAN_UP_S, env=None)

    def _program(self, where: str) -> dict[str, Any]:
        """How git is started, where it may be one that is brought along."""
        if not self._caller.is_bundled:
            return {}
        with _git_errors(where):
            answer = self._caller.json("GET", "/api/git/program")
        return {"git": answer["argv"] if answer["environment"] else (), "environment": answer["environment"]}


@contextlib.contextmanager
def _git_errors(path: str) -> Iterator[None]:
    """A server's "git failed" (400) and "there is no git" (501), as the error that says so."""
    try:
        yield
    except ServerResponseError as error:
        if error.status == _NOT_IMPLEMENTED:
            raise _no_git(path, error.evidence) from error
        if error.status != _BAD_REQUEST:
            raise
        what = f"git has no answer for {path}."
        raise GitError(what, path=path, status=error.status, evidence=error.evidence) from error


def _no_git(path: str, evidence: str) -> GitError:
    return GitError(
        f"There is no git for {path}.",
        path=path,
        status=_NOT_IMPLEMENTED,
        evidence=evidence.strip(),
        remedy="Install git in the image; or, with image=, on the machine where this package is: it is brought along.",
    )
