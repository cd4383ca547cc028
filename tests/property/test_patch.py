"""A patch of anything, applied in a fresh clone, gives the same tree; and the repository is as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_workspace.client import patching

IDENTITY = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main", "-c", "core.safecrlf=false")


def git(where: Path, *words: str, data: bytes = b"", env: dict[str, str] | None = None) -> bytes:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    ended = subprocess.run(
        ["git", "-C", str(where), *IDENTITY, *words],
        input=data,
        capture_output=True,
        check=False,
        env=clean | {"HOME": "/nonexistent"} | (env or {}),
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def make_patch(where: Path, shell: Sequence[str] = ("sh",), env: dict[str, str] | None = None) -> bytes:
    ended = subprocess.run(
        [*shell, "-c", patching.patching(str(where))],
        capture_output=True,
        check=False,
        env=dict(os.environ) | (env or {}),
    )
    assert ended.returncode == 0, ended.stderr
    folder = Path(os.fsdecode(ended.stdout.removesuffix(b"\n")))
    try:
        return (folder / "patch").read_bytes()
    finally:
        shutil.rmtree(folder)


def tree_of(root: Path) -> bytes:
    """The tree that `git add -A` makes of the work tree, by way of another index."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"GIT_INDEX_FILE": f"{folder}/index"}
        git(root, "add", "-A", ".", env=env)
        return git(root, "write-tree", env=env)


def applied(root: Path, patch: bytes, has_commit: bool) -> bytes:
    """The tree of a fresh clone with the patch."""
    clone = root.parent / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    if has_commit:
        git(root.parent, "clone", "-q", str(root), str(clone))
    else:
        clone.mkdir()
        git(clone, "init", "-q")
    if patch:
        git(clone, "apply", "--index", "--binary", "-", data=patch)
    tree = git(clone, "write-tree")
    assert tree_of(clone) == tree
    return tree


def state_of(root: Path) -> dict[str, bytes]:
    """Every file of the repository itself, and when each was written.

    But for objects: git gives one that it would have written anew the time of now, so that nobody collects it.
    """
    return {
        str(path): path.read_bytes() + (b"" if "objects" in path.parts else str(path.stat().st_mtime_ns).encode())
        for path in sorted((root / ".git").rglob("*"))
        if path.is_file()
    }


NAMES = st.sampled_from(
    ["a", "b", "c d", "ü", 'q"u', "new\nline", "tab\t", "-dash", "back\\slash", "\udcff", "d", ".x"]
)
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.text(st.sampled_from("ab\r\n ü"), max_size=40).map(lambda text: text.encode()),
    st.sampled_from([b"one\r\ntwo\r\n", b"no end", b"\0bin\xff" * 50, b"".join(b"%d\n" % n for n in range(60))]),
)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
FILES = st.one_of(
    st.tuples(st.just("file"), CONTENTS, st.booleans()),
    st.tuples(st.just("link"), st.sampled_from([b"a", b"/nowhere", b"../x y"]), st.just(False)),
)
TREES = st.dictionaries(PATHS, FILES, max_size=6)
ATTRIBUTES = st.sampled_from([b"", b"* text=auto\n", b"*.x binary\na -diff\n", b"b filter=evil diff=evil\n"])


def lay(root: Path, tree: dict[str, tuple[str, bytes, bool]]) -> None:
    """Put files in the place of whatever is in their way."""
    for name, (kind, content, is_executable) in tree.items():
        path = root / name
        for above in reversed(path.relative_to(root).parents[:-1]):
            if (root / above).is_symlink() or (root / above).is_file():
                (root / above).unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if kind == "link":
            path.symlink_to(os.fsdecode(content))
        else:
            path.write_bytes(content)
            path.chmod(0o755 if is_executable else 0o644)


def take_away(root: Path, names: Sequence[str]) -> None:
    for name in names:
        path = root / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)


@settings(max_examples=60, deadline=None)
@given(
    before=TREES, after=TREES, gone=st.lists(PATHS, max_size=4), attributes=ATTRIBUTES,
    has_commit=st.booleans(), is_staged=st.booleans(),
)  # fmt: skip
def test_a_patch_applied_in_a_fresh_clone_gives_the_same_tree(
    before: dict[str, tuple[str, bytes, bool]],
    after: dict[str, tuple[str, bytes, bool]],
    gone: list[str],
    attributes: bytes,
    has_commit: bool,
    is_staged: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "re po")
        root.mkdir()
        git(root, "init", "-q")
        (root / ".gitattributes").write_bytes(attributes)
        (root / ".gitignore").write_bytes(b"ignored\n")
        lay(root, before)
        if has_commit:
            git(root, "add", "-A")
            git(root, "commit", "-qm", "before")
        take_away(root, [*gone, *list(before)[:1]])
        lay(root, after)
        (root / "ignored").write_bytes(b"not for anybody")
        if is_staged:
            git(root, "add", "-A")
        then = state_of(root)
        patch = make_patch(root)
        assert state_of(root) == then
        assert applied(root, patch, has_commit) == tree_of(root)
