"""The patch of a repository: what is in it, what is not, and what a hostile repository gets out of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hpc_workspace.client import patching
from tests.property.test_patch import applied, git, make_patch, state_of, tree_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "repo"
    made.mkdir()
    git(made, "init", "-q")
    (made / "kept").write_text("".join(f"{n}\n" for n in range(50)))
    (made / "gone").write_text("bye\n")
    git(made, "add", ".")
    git(made, "commit", "-qm", "first")
    return made


def ended(path: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = ["/bin/sh", "-c", patching.patching(str(path))]
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=dict(os.environ) | (env or {}))


def test_nothing_changed_is_an_empty_patch(root: Path) -> None:
    assert make_patch(root) == b""


def test_it_is_the_same_from_any_directory_of_the_repository(root: Path) -> None:
    (root / "sub").mkdir()
    (root / "sub/new").write_text("x")
    (root / "gone").unlink()
    assert make_patch(root / "sub") == make_patch(root) != b""


@pytest.mark.parametrize("shell", [("bash",), ("bash", "--posix"), ("sh",)])
def test_any_shell_makes_the_same(root: Path, shell: tuple[str, ...]) -> None:
    (root / "a b\nü").write_bytes(b"\0\1")
    assert make_patch(root, shell) == make_patch(root)


def test_a_mode_and_a_rename_are_told_as_such(root: Path) -> None:
    (root / "kept").rename(root / "moved")
    (root / "gone").chmod(0o755)
    patch = make_patch(root)
    assert b"rename from kept\nrename to moved\n" in patch
    assert b"old mode 100644\nnew mode 100755\n" in patch
    assert applied(root, patch, has_commit=True) == tree_of(root)


def test_a_link_that_makes_room_for_a_directory_and_moves(root: Path) -> None:
    (root / "b").symlink_to("a")
    (root / "a").mkdir()
    (root / "a/a").write_text("")
    git(root, "add", ".")
    git(root, "commit", "-qm", "a link")
    (root / "a/a").unlink()
    (root / "a").rmdir()
    (root / "b").rename(root / "a")
    (root / "b").mkdir()
    (root / "b/a").write_text("")
    assert applied(root, make_patch(root), has_commit=True) == tree_of(root)


def test_an_edit_in_the_same_moment_and_of_the_same_size_is_seen(root: Path) -> None:
    for turn in range(20):
        (root / "gone").write_text("one\n")
        git(root, "add", "gone")
        (root / "gone").write_text("two\n")
        assert b"+two" in make_patch(root), turn


def test_fifty_megabytes_of_anything(root: Path) -> None:
    (root / "large").write_bytes(os.urandom(50_000_000))
    assert applied(root, make_patch(root), has_commit=True) == tree_of(root)


def test_a_hostile_repository_has_nothing_run_for_it(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evil = f"sh -c 'echo \"$0\" >>{run}; cat'"
    for name in ("core.fsmonitor", "diff.external", "diff.evil.command", "diff.evil.textconv", "filter.evil.clean",
                 "filter.evil.smudge", "filter.evil.process", "core.pager", "core.sshCommand", "core.editor",
                 "core.alternateRefsCommand"):  # fmt: skip
        git(root, "config", name, evil)
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for hook in ("post-index-change", "pre-commit", "fsmonitor-watchman", "post-checkout", "reference-transaction"):
        (hooks / hook).write_text(f"#!/bin/sh\necho hook >>{run}\n")
        (hooks / hook).chmod(0o755)
    git(root, "config", "core.hooksPath", str(hooks))
    shutil.copytree(hooks, root / ".git/hooks", dirs_exist_ok=True)
    (root / ".gitattributes").write_text("* filter=evil diff=evil\n")
    (root / "kept").write_text("changed\n")
    (root / "new").write_text("new\n")
    env = {"GIT_EXTERNAL_DIFF": evil, "GIT_PAGER": evil, "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.fsmonitor",
           "GIT_CONFIG_VALUE_0": evil}  # fmt: skip
    patch = make_patch(root, env=env)
    assert b"+changed" in patch
    assert b"+new" in patch
    assert not run.exists()
    # It is not that nothing would have been run.
    subprocess.run(["git", "-C", str(root), "add", "-A"], check=False, capture_output=True, env=os.environ | env)
    assert run.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_repository_of_another_user_is_none_the_worse(root: Path) -> None:
    (root / "kept").write_text("changed\n")
    for path in [root, *root.rglob("*")]:
        os.chown(path, 12345, 12345)
    assert b"+changed" in make_patch(root)


def test_what_the_repository_reads_files_by_holds(root: Path) -> None:
    git(root, "config", "core.autocrlf", "input")
    git(root, "config", "core.filemode", "false")
    (root / ".git/info/exclude").write_text("secret\n")
    (root / "secret").write_text("x")
    (root / "gone").chmod(0o755)
    (root / "kept").write_bytes((root / "kept").read_bytes().replace(b"\n", b"\r\n"))
    assert make_patch(root) == b""


def test_a_linked_worktree_and_a_split_index(root: Path, tmp_path: Path) -> None:
    git(root, "update-index", "--split-index")
    git(root, "worktree", "add", "-q", str(tmp_path / "linked"), "-b", "other")
    for place in (root, tmp_path / "linked"):
        (place / "kept").write_text("changed\n")
        (place / "new").write_text("new\n")
        assert applied(root, make_patch(place), has_commit=True) == tree_of(place)


def test_a_submodule_is_the_commit_that_it_is_at_and_a_repository_inside_is_left_out(
    root: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    part.mkdir()
    git(part, "init", "-q")
    (part / "f").write_text("1\n")
    git(part, "add", ".")
    git(part, "commit", "-qm", "one")
    git(root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(part), "sub")
    git(root, "commit", "-qm", "with a part")
    (root / "sub/f").write_text("2\n")
    assert make_patch(root) == b""
    git(root / "sub", "commit", "-qam", "two")
    for name in ("inner\nrepo", "empty"):
        (root / name).mkdir()
        git(root / name, "init", "-q")
        (root / name / "x").write_text("x")
    git(root / "inner\nrepo", "add", ".")
    git(root / "inner\nrepo", "commit", "-qm", "inside")
    (root / "new").write_text("new\n")
    then = state_of(root)
    patch = make_patch(root)
    assert state_of(root) == then
    assert b"Subproject commit" in patch
    assert b"inner" not in patch
    assert b"empty" not in patch
    assert b"+new" in patch
    git(tmp_path, "clone", "-q", str(root), str(tmp_path / "clone"))
    git(tmp_path / "clone", "apply", "--index", "-", data=patch)
    head = git(root / "sub", "rev-parse", "HEAD").strip()
    assert head in git(tmp_path / "clone", "ls-files", "--stage", "sub")


def test_no_repository_and_no_git_are_told_apart(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    assert (ended(outside).returncode, "no .git" in ended(outside).stderr) == (patching.NO_REPOSITORY, True)
    assert ended(tmp_path / "absent").returncode == patching.NO_REPOSITORY
    assert ended(root, {"PATH": str(outside)}).returncode == patching.NO_GIT


def test_it_leaves_nothing_behind_when_git_fails(root: Path, tmp_path: Path) -> None:
    (root / ".git/index").write_bytes(b"no index")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    failed = ended(root, {"TMPDIR": str(scratch)})
    assert failed.returncode == patching.FAILED
    assert "index" in failed.stderr
    assert list(scratch.iterdir()) == []
