"""Archives from a hostile side: what is refused, by name, and that nothing of it is on the disk afterwards."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_workspace.server.tarstream import END, ArchiveError, Member, Reader, pack_header, padding
from hpc_workspace.server.trees import ChangedError, NewTree, gathered, pack, scan


def _archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", **values: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    for key, value in values.items():
        setattr(info, key, value)
    return info


TOP = (_info(".", tarfile.DIRTYPE, mode=0o755), b"")
OUT = (_info("out", tarfile.SYMTYPE, "/etc"), b"")
HOSTILE = {
    "an absolute name": ([TOP, (_info("/etc/passwd"), b"x")], "/etc/passwd"),
    "a name that leads out": ([TOP, (_info("a/../../b"), b"x")], "a/../../b"),
    "through an absolute link": ([TOP, OUT, (_info("out/passwd"), b"x")], "out/passwd"),
    "through a link that leads up": (
        [TOP, (_info("up", tarfile.SYMTYPE, ".."), b""), (_info("up/x"), b"x")],
        "up/x",
    ),
    "a directory over a link": ([TOP, OUT, (_info("out", tarfile.DIRTYPE), b"")], "out"),
    "a file over a link": ([TOP, OUT, (_info("out"), b"x")], "out"),
    "a hard link": ([TOP, (_info("hard", tarfile.LNKTYPE, "/etc/passwd"), b"")], "hard"),
    "a device": ([TOP, (_info("null", tarfile.CHRTYPE), b"")], "null"),
    "a disk": ([TOP, (_info("sda", tarfile.BLKTYPE), b"")], "sda"),
    "a FIFO": ([TOP, (_info("fifo", tarfile.FIFOTYPE), b"")], "fifo"),
    "a sparse map": ([TOP, (_info("holes", tarfile.GNUTYPE_SPARSE), b"")], "holes"),
    "the same twice": ([TOP, (_info("a"), b"1"), (_info("a"), b"2")], "a"),
    "a file without its directory": ([TOP, (_info("no/where"), b"x")], "no/where"),
    "a file as a directory": ([TOP, (_info("a"), b"x"), (_info("a/b"), b"x")], "a/b"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_member_is_refused_by_name_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    members, member = HOSTILE[name]
    tree = NewTree(tmp_path / "new")
    try:
        with pytest.raises(ArchiveError) as caught:
            tree.write(_archive(*members))
            tree.publish()
    finally:
        tree.discard()
    assert caught.value.member == member
    assert list(tmp_path.iterdir()) == []


def test_an_extended_header_of_any_size_costs_no_memory() -> None:
    info = _info("././@PaxHeader", tarfile.XHDTYPE)
    info.size = 1 << 40
    with pytest.raises(ArchiveError, match="extended header"):
        Reader(NewTreeThatTakesNothing()).feed(info.tobuf(tarfile.GNU_FORMAT))


class NewTreeThatTakesNothing:
    """A sink that must get nothing."""

    def begin(self, member: Member) -> None:
        raise AssertionError(member)

    def write_content(self, data: memoryview) -> None:
        raise AssertionError(data)

    def end(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("text", [b"x path=a\n", b"9999 path=a\n", b"8 path=a", b"-1 path=a\n"])
def test_a_broken_extended_header_is_refused(text: bytes) -> None:
    info = _info("x", tarfile.XHDTYPE)
    info.size = len(text)
    with pytest.raises(ArchiveError):
        Reader(NewTreeThatTakesNothing()).feed(
            info.tobuf(tarfile.USTAR_FORMAT) + text + padding(len(text)) + _info("y").tobuf(tarfile.USTAR_FORMAT)
        )


def test_an_archive_that_ends_too_early_is_none(tmp_path: Path) -> None:
    tree = NewTree(tmp_path / "new")
    tree.write(_archive(TOP, (_info("a"), b"x" * 5000))[:2048])
    with pytest.raises(ArchiveError, match="ends in its middle"):
        tree.publish()
    tree.discard()
    assert list(tmp_path.iterdir()) == []


def test_nothing_from_elsewhere_runs_as_somebody_else(tmp_path: Path) -> None:
    tree = NewTree(tmp_path / "new")
    tree.write(_archive(TOP, (_info("su", mode=0o6755), b"x")))
    tree.publish()
    tree.discard()
    assert oct((tmp_path / "new/su").stat().st_mode & 0o7777) == "0o755"


@pytest.mark.parametrize("form", ["posix", "gnu", "ustar"])
def test_gnu_tars_archives_are_read(tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    (source / "d" / ("x" * 90)).mkdir(parents=True)
    (source / "d" / ("x" * 90) / "file").write_bytes(b"content")
    (source / "link").symlink_to("d")
    argv = ["tar", f"--format={form}", "-C", str(source), "-cf", "-", "."]
    tree = NewTree(tmp_path / "new")
    tree.write(subprocess.run(argv, capture_output=True, check=True).stdout)
    tree.publish()
    tree.discard()
    assert (tmp_path / "new/d" / ("x" * 90) / "file").read_bytes() == b"content"
    assert (tmp_path / "new/link").readlink() == Path("d")


NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=60)
RAW_NAMES = st.binary(min_size=1, max_size=60).map(os.fsdecode).filter(lambda name: not set(name) & {"/", "\0"})
MEMBERS = st.builds(
    Member,
    name=st.lists(NAMES | RAW_NAMES, min_size=1, max_size=4)
    .filter(lambda parts: not {".", ".."} & set(parts))
    .map("/".join),
    kind=st.just("file"),
    mode=st.integers(0, 0o777),
    mtime_ns=st.integers(-(10**19), 10**19),
    size=st.integers(0, 3000),
)


class _Kept:
    def __init__(self) -> None:
        self.members: list[Member] = []
        self.data: list[bytes] = []

    def begin(self, member: Member) -> None:
        self.members.append(member)
        self.data.append(b"")

    def write_content(self, data: memoryview) -> None:
        self.data[-1] += bytes(data)

    def end(self) -> None:
        """Nothing."""


@given(st.lists(MEMBERS, max_size=5), st.integers(1, 4000))
def test_what_is_written_is_read_in_pieces_of_any_size(members: list[Member], step: int) -> None:
    whole = b"".join(pack_header(m) + b"x" * m.size + padding(m.size) for m in members) + END
    kept = _Kept()
    reader = Reader(kept)
    for at in range(0, len(whole), step):
        reader.feed(whole[at : at + step])
    reader.close()
    assert kept.members == members
    assert kept.data == [b"x" * m.size for m in members]


def _packed(root: Path, offset: int, act: Callable[[], None] = lambda: None) -> bytes:
    fd = os.open(root, os.O_RDONLY)
    try:
        found = scan(fd)
        act()
        data = b"".join(gathered(pack(fd, found.version, offset)))
        assert len(data) == found.archive_bytes - offset
        return data
    finally:
        os.close(fd)


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d/a").write_bytes(b"a" * 700)
    (root / "b").write_bytes(os.urandom(1300))
    (root / "l").symlink_to("d")
    return root


def test_an_archive_goes_on_at_any_byte(small_tree: Path) -> None:
    whole = _packed(small_tree, 0)
    for offset in range(0, len(whole), 97):
        assert _packed(small_tree, offset) == whole[offset:]


CHANGES: dict[str, Callable[[Path], object]] = {
    "other bytes": lambda root: (root / "d/a").write_bytes(b"b" * 700),
    "more bytes": lambda root: (root / "d/a").write_bytes(b"a" * 900),
    "another mode": lambda root: (root / "b").chmod(0o700),
    "a new file": lambda root: (root / "new").touch(),
    "a file less": lambda root: (root / "b").unlink(),
    "another link": lambda root: ((root / "l").unlink(), (root / "l").symlink_to("b")),
    "another file of that name": lambda root: ((root / "n").write_bytes(b"a" * 700), (root / "n").rename(root / "d/a")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_directory_that_changed_is_not_packed_to_its_end(small_tree: Path, change: str) -> None:
    os.utime(small_tree / "d/a", ns=(1, 1))
    with pytest.raises(ChangedError):
        _packed(small_tree, 0, lambda: (CHANGES[change](small_tree), None)[1])
