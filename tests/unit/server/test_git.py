"""Claims about /api/git, in real repositories."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.server.running import RunningServer


def _git(where: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main"]
    argv = ["git", "-C", str(where), *identity, *words]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    root.mkdir()
    _git(root, "init", "-q")
    (root / "kept").write_text("one\n")
    (root / "gone").write_text("bye\n")
    (root / "a b ü").write_text("x\n")
    _git(root, "add", ".")
    _git(root, "commit", "-qm", "first")
    return root


def _changes(server: RunningServer, path: Path, **query: str) -> dict[str, str]:
    answer = server.http.get("/api/git/changes", params={"path": str(path), **query})
    assert answer.status_code == 200, answer.text
    return {change["path"]: change["status"] for change in answer.json()}


def _diff(server: RunningServer, path: Path, **query: str) -> Any:
    return server.http.get("/api/git/diff", params={"path": str(path), **query}).json()


def test_edits_deletions_and_new_files_are_listed_whatever_their_names(server: RunningServer, repository: Path) -> None:
    (repository / "kept").write_text("two\n")
    (repository / "gone").unlink()
    (repository / "a b ü").write_text("y\n")
    (repository / "new\ttab").write_text("")
    assert _changes(server, repository) == {
        "a b ü": "UPDATED", "gone": "DELETED", "kept": "UPDATED", "new\ttab": "ADDED",
    }  # fmt: skip


def test_paths_are_relative_to_the_directory_asked_for(server: RunningServer, repository: Path) -> None:
    (repository / "sub").mkdir()
    (repository / "sub" / "x").write_text("")
    (repository / "kept").write_text("two\n")
    assert _changes(server, repository / "sub") == {"x": "ADDED"}


def test_a_nested_repository_answers_for_itself(server: RunningServer, repository: Path) -> None:
    inner = repository / "inner"
    inner.mkdir()
    _git(inner, "init", "-q")
    (inner / "n").write_text("")
    assert _changes(server, repository) == {"inner/n": "ADDED"}


def test_outside_a_repository_there_are_no_changes_and_no_diff(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    assert _changes(server, tmp_path) == {}
    assert _diff(server, tmp_path / "f") == {"modified": None, "original": None}


def test_committed_work_on_a_branch_stays_visible_against_its_fork_point(
    server: RunningServer, repository: Path
) -> None:
    _git(repository, "switch", "-qc", "work")
    (repository / "kept").write_text("two\n")
    _git(repository, "commit", "-qam", "second")
    assert _changes(server, repository) == {"kept": "UPDATED"}
    assert _changes(server, repository, ref="HEAD") == {}
    assert _diff(server, repository / "kept") == {"modified": "two", "original": "one"}


def test_a_pushed_branch_is_compared_with_origin_s_default(server: RunningServer, repository: Path) -> None:
    clone = repository.parent / "clone"
    _git(repository.parent, "clone", "-q", str(repository), str(clone))
    _git(clone, "switch", "-qc", "work")
    (clone / "kept").write_text("two\n")
    _git(clone, "commit", "-qam", "second")
    _git(clone, "push", "-q", "origin", "work")
    assert _changes(server, clone) == {"kept": "UPDATED"}


def test_a_repository_without_commits_shows_all_as_new(server: RunningServer, tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    (tmp_path / "f").write_text("text\n")
    assert _changes(server, tmp_path) == _changes(server, tmp_path, ref="HEAD") == {"f": "ADDED"}
    assert _diff(server, tmp_path / "f") == {"modified": "text", "original": ""}


def test_a_deleted_file_shows_its_old_text(server: RunningServer, repository: Path) -> None:
    (repository / "gone").unlink()
    assert _diff(server, repository / "gone") == {"modified": "", "original": "bye"}


@pytest.mark.parametrize("ref", ["nonsense", "--output=/tmp/x"])
def test_a_ref_that_names_no_commit_is_400(server: RunningServer, repository: Path, ref: str) -> None:
    for route, path in (("changes", repository), ("diff", repository / "kept")):
        answer = server.http.get(f"/api/git/{route}", params={"path": str(path), "ref": ref})
        assert (answer.status_code, bool(answer.json()["detail"])) == (400, True)


def test_a_file_that_is_nowhere_or_too_large_is_400(server: RunningServer, repository: Path) -> None:
    (repository / "large").write_bytes(b"x" * 1_100_000)
    for name in ("absent", "large"):
        assert server.http.get("/api/git/diff", params={"path": str(repository / name)}).status_code == 400


def test_an_image_without_git_is_501(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    running = RunningServer(tmp_path, {"PATH": str(bare)})
    try:
        answer = running.http.get("/api/git/changes", params={"path": str(tmp_path)})
        assert (answer.status_code, answer.json()["detail"]) == (501, "git is not installed in this image")
    finally:
        running.stop()
