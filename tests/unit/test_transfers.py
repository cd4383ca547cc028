"""Uploads and downloads of the client, with a real bundled server behind connections that are cut on purpose."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_workspace.client.calls import Caller
from hpc_workspace.client.commands import Commands
from hpc_workspace.client.files import Files
from hpc_workspace.client.shared import SharedMount
from hpc_workspace.connect.streams import SocketStream
from hpc_workspace.errors import FileChangedError, FileError, UnsafeFileError, WorkspaceError
from hpc_workspace.exchange import Wish
from tests.conftest import skip_or_fail
from tests.unit.server.running import KEY, RunningServer, eventually

MB = 1_000_000


class _Cut(SocketStream):
    """A connection that counts what it carries, and breaks where its way says so."""

    def __init__(self, connection: socket.socket, way: CutWay) -> None:
        super().__init__(connection)
        self._way = way

    def _count(self, size: int) -> None:
        way = self._way
        way.carried += size
        way.since += size
        if way.cuts and way.since > way.cuts[0]:
            way.since = 0
            del way.cuts[0]
            self.close()
            raise ConnectionResetError("cut")

    def recv(self, size: int) -> bytes:
        data = super().recv(size)
        self._count(len(data))
        return data

    def sendall(self, data: bytes) -> None:
        super().sendall(data)
        self._count(len(data))


class CutWay:
    """A way to a server's socket. `cuts`: after how many bytes, each time, it breaks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cuts: list[int] = []
        self.carried = self.since = 0

    def dial(self, wish: Wish, call_began_s: float = 0.0) -> _Cut:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        return _Cut(connection, self)

    def explain(self, error: WorkspaceError, since_s: float) -> WorkspaceError:
        return error

    def restart_since(self, call_began_s: float) -> None:
        return None


@pytest.fixture
def way(server: RunningServer) -> CutWay:
    return CutWay(server.socket)


@pytest.fixture
def files(way: CutWay, tmp_path: Path) -> Iterator[Files]:
    caller = Caller(way, api_key=KEY, server="bundled", working_dir=str(tmp_path / "there"))
    with contextlib.closing(caller):
        yield Files(caller, Commands(caller))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(20 * MB))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for number in range(20):
        path = root / f"d{number % 4}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(MB))
    return root


def _same(one: Path, other: Path) -> bool:
    return subprocess.run(["diff", "-r", str(one), str(other)], check=False).returncode == 0


@pytest.mark.parametrize("name", ["large", "folder"])
def test_a_cut_transfer_goes_on_where_it_was(
    request: pytest.FixtureRequest, files: Files, way: CutWay, tmp_path: Path, name: str
) -> None:
    source: Path = request.getfixturevalue(name)
    for act in (
        lambda: files.upload(source, "new"),
        lambda: files.download("new", tmp_path / "back"),
    ):
        way.carried = way.since = 0
        way.cuts = [7 * MB, 7 * MB]
        act()
        assert way.cuts == []
        assert way.carried < 22.5 * MB + 2 * 1.2 * MB, "it began anew"
    assert _same(source, tmp_path / "there/new")
    assert _same(source, tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new"]


def test_an_upload_whose_answer_was_lost_is_not_sent_again(
    files: Files, way: CutWay, large: Path, tmp_path: Path
) -> None:
    way.cuts = [20 * MB + 600]
    files.upload(large, "new")
    assert _same(large, tmp_path / "there/new")
    assert way.carried < 21 * MB


def test_what_has_arrived_of_an_upload_that_nobody_goes_on_with_is_removed(
    server: RunningServer, way: CutWay, tmp_path: Path
) -> None:
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(server.socket))
    query = f"path={tmp_path}/new&upload={'a' * 32}&linger_s=0.3&total=9000000"
    head = (
        f"PUT /api/file/raw?{query} HTTP/1.1\r\nHost: x\r\nX-Session-API-Key: {KEY}\r\nContent-Length: 9000000\r\n\r\n"
    )
    with raw:
        raw.sendall(head.encode() + b"n" * 3 * MB)
        eventually(lambda: len(list(tmp_path.glob(".*.part"))) == 1)
    eventually(lambda: not list(tmp_path.glob(".*.part")))


def test_a_server_that_ends_leaves_nothing_of_an_upload(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    running = RunningServer(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(running.socket))
        query = f"path={tmp_path}/new&upload={'b' * 32}&total=9000000"
        head = f"PUT /api/file/raw?{query} HTTP/1.1\r\nHost: x\r\nX-Session-API-Key: {KEY}\r\n"
        raw.sendall(head.encode() + b"Content-Length: 9000000\r\n\r\n" + b"n" * 3 * MB)
        eventually(lambda: len(list(tmp_path.glob(".*.part"))) == 1)
        running.stop()
    assert list(tmp_path.glob(".*.part")) == []


def test_a_source_that_changes_during_an_upload_is_an_error_and_leaves_nothing(
    files: Files, large: Path, tmp_path: Path
) -> None:
    def change(done: int, total: int | None) -> None:
        with large.open("ab") as file:
            file.write(b"x")

    with pytest.raises(FileChangedError):
        files.upload(large, "new", change)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_file_that_changes_once_during_a_download_is_fetched_anew(files: Files, large: Path, tmp_path: Path) -> None:
    changed: list[int] = []

    def change(done: int, total: int | None) -> None:
        if not changed:
            changed.append(done)
            large.write_bytes(b"y" * 20 * MB)

    files.download(str(large), tmp_path / "back", change)
    assert (tmp_path / "back").read_bytes() == b"y" * 20 * MB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "large"]


def test_a_download_replaces_a_link_and_does_not_follow_it(files: Files, large: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "back").symlink_to("elsewhere")
    files.download(str(large), tmp_path / "back")
    assert not (tmp_path / "back").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_hostile_archive_is_an_error_of_ours_that_names_the_member(tmp_path: Path) -> None:
    from hpc_workspace.client.local import DiskLanding, Found
    from tests.unit.test_tarstream import OUT, TOP, _archive, _info

    data = _archive(TOP, OUT, (_info("out/passwd"), b"x"))
    found = Found("directory", 0o755, 0, len(data), 1, "v")
    landing = DiskLanding(tmp_path / "new", found)
    with pytest.raises(UnsafeFileError, match="out/passwd") as caught:
        landing.write(data)
    landing.discard()
    assert caught.value.path == "out/passwd"
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def _small_disk(path: Path, size: str) -> Iterator[Path]:
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        skip_or_fail("a small tmpfs to fill needs root on Linux")
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("name", ["large", "folder"])
def test_a_full_disk_on_either_side_is_an_error_and_leaves_nothing(
    request: pytest.FixtureRequest, files: Files, tmp_path: Path, name: str
) -> None:
    source: Path = request.getfixturevalue(name)
    with _small_disk(tmp_path / "small", "5m") as small:
        for act in (
            lambda: files.upload(source, str(small / "new")),
            lambda: files.download(str(source), small / "new"),
        ):
            with pytest.raises(FileError) as caught:
                act()
            assert caught.value.errno == errno.ENOSPC
            eventually(lambda: list(small.iterdir()) == [])


def test_large_files_move_in_little_memory_on_both_sides(files: Files, server: RunningServer, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        for _ in range(300):
            file.write(os.urandom(MB))
    (tmp_path / "warm").write_bytes(b"x" * 3 * MB)
    files.upload(tmp_path / "warm", "warm")
    files.download("warm", tmp_path / "warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    server_before = server.memory_bytes()
    files.upload(source, "new")
    files.download("new", tmp_path / "back")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 32 * 1024 * 1024
    assert server.memory_bytes() - server_before < 32 * 1024 * 1024


# --- the shared file system ---


@pytest.fixture
def shared(way: CutWay, tmp_path: Path) -> Iterator[Files]:
    mount = tmp_path / "mount"
    mount.mkdir()
    caller = Caller(way, api_key=KEY, server="bundled", working_dir=str(mount))
    with contextlib.closing(caller):
        yield Files(caller, Commands(caller), SharedMount(mount, str(mount)))


@pytest.mark.parametrize("name", ["large", "folder"])
def test_no_connection_carries_the_bytes_of_a_shared_directory(
    request: pytest.FixtureRequest, shared: Files, way: CutWay, tmp_path: Path, name: str
) -> None:
    source: Path = request.getfixturevalue(name)
    source.chmod(0o750)
    shared.upload(source, "d/new")
    shared.download("d/new", tmp_path / "back")
    assert way.carried < 20_000
    for copy in (tmp_path / "mount/d/new", tmp_path / "back"):
        assert _same(source, copy)
        assert (copy.stat().st_mode, copy.stat().st_mtime_ns) == (source.stat().st_mode, source.stat().st_mtime_ns)
    assert [path.name for path in (tmp_path / "mount").iterdir()] == ["d"]


def test_a_directory_that_only_has_the_same_name_is_not_taken_for_shared(
    way: CutWay, large: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    caller = Caller(way, api_key=KEY, server="bundled", working_dir=str(there))
    with contextlib.closing(caller):
        files = Files(caller, Commands(caller), SharedMount(here, str(there)))
        files.upload(large, "new")
        assert _same(large, there / "new")
        shutil.copy(large, here / "new")  # same name, same size, another file
        (there / "new").write_bytes(b"z" * 20 * MB)
        files.download("new", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"z" * 20 * MB
    assert [path.name for path in here.iterdir()] == ["new"]


def test_links_that_lead_out_of_a_shared_directory_are_left_to_the_workspace(
    shared: Files, way: CutWay, large: Path, tmp_path: Path
) -> None:
    """They mean something else inside: this side must neither read nor write what they lead to here."""
    (tmp_path / "mount/out").symlink_to(tmp_path)
    (tmp_path / "mount/file").symlink_to(large)
    for name in ("file", "out/large"):
        way.carried = 0
        shared.download(name, tmp_path / "back")
        assert way.carried > 20 * MB


def test_a_link_put_in_the_way_while_a_directory_is_read_leads_nowhere(
    shared: Files, folder: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "f3").write_bytes(b"s" * MB)
    shared.upload(folder, "new")

    def swap(done: int, total: int | None) -> None:
        place = tmp_path / "mount/new/d3"
        if not place.is_symlink():
            shutil.rmtree(place)
            place.symlink_to(secret)

    shared.download("new", tmp_path / "back", swap)
    assert (tmp_path / "back/d3").is_symlink(), "the bytes behind the link came"


def test_a_full_shared_disk_is_an_error_and_leaves_nothing(way: CutWay, large: Path, tmp_path: Path) -> None:
    with _small_disk(tmp_path / "small", "5m") as small:
        caller = Caller(way, api_key=KEY, server="bundled", working_dir=str(small))
        with contextlib.closing(caller):
            files = Files(caller, Commands(caller), SharedMount(small, str(small)))
            with pytest.raises(FileError) as caught:
                files.upload(large, "new")
        assert caught.value.errno == errno.ENOSPC
        assert list(small.iterdir()) == []
