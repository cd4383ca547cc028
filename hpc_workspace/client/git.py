"""Git repositories of a workspace, through its agent server."""

from __future__ import annotations

from hpc_workspace.client.calls import Caller
from hpc_workspace.results import GitChange, GitDiff


class Git:
    """Asks about repositories by `caller`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def changes(self, path: str) -> list[GitChange]:
        """The changed files of the repository at `path`; empty where there is none."""
        answer = self._caller.any_json("GET", "/api/git/changes", params={"path": self._caller.absolute(path)})
        return [GitChange.model_validate(item) for item in answer]

    def diff(self, path: str) -> GitDiff:
        """The file at `path` before and after."""
        return GitDiff.model_validate(
            self._caller.json("GET", "/api/git/diff", params={"path": self._caller.absolute(path)})
        )
