"""Claims about /api/file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.unit.server.running import KEY, RunningServer, eventually


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_upload_and_download_carry_every_byte(server: RunningServer, tmp_path: Path) -> None:
    data = os.urandom(3_000_001) + b"\r\n--boundary\r\n"
    target = tmp_path / "new" / "below" / "ü b;c"
    answer = server.http.post("/api/file/upload", params={"path": str(target)}, files={"file": ("name", data)})
    assert answer.json() == {"success": True, "file_size": len(data)}
    assert target.read_bytes() == data
    assert (_mode(target), _mode(target.parent)) == (0o644, 0o755)
    back = server.http.get("/api/file/download", params={"path": str(target)})
    assert back.content == data
    assert back.headers["content-length"] == str(len(data))
    assert back.headers["x-file-mode"] == "0644"


def test_a_raw_upload_sets_mode_and_time(server: RunningServer, tmp_path: Path) -> None:
    target = tmp_path / "tool"
    query = {"path": str(target), "mode": "0755", "mtime": "1000000000.5"}
    assert server.http.put("/api/file/raw", params=query, content=b"#!/bin/sh\n").json()["file_size"] == 10
    assert (_mode(target), target.stat().st_mtime) == (0o755, 1000000000.5)
    back = server.http.get("/api/file/download", params={"path": str(target)})
    assert float(back.headers["x-file-mtime"]) == 1000000000.5


def test_an_upload_over_a_file_keeps_its_mode_and_goes_through_a_link(server: RunningServer, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o750)
    link.symlink_to(real)
    server.http.put("/api/file/raw", params={"path": str(link)}, content=b"new")
    assert (real.read_text(), _mode(real), link.is_symlink()) == ("new", 0o750, True)


@pytest.mark.parametrize("name", ["/api/file/raw", "/api/file/download"])
def test_a_relative_path_is_400(server: RunningServer, name: str) -> None:
    method = "PUT" if name.endswith("raw") else "GET"
    assert server.http.request(method, name, params={"path": "relative"}).status_code == 400
    assert server.http.request(method, name).status_code == 422


def test_wrong_paths_are_told_apart(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    get = server.http.get
    assert get("/api/file/download", params={"path": str(tmp_path / "absent")}).status_code == 404
    assert get("/api/file/download", params={"path": str(tmp_path)}).status_code == 400
    assert get("/api/file/download", params={"path": "/dev/null"}).status_code == 400
    for path in (tmp_path, tmp_path / "file" / "below", Path("/dev/null")):
        answer = server.http.put("/api/file/raw", params={"path": str(path)}, content=b"x")
        assert (answer.status_code, bool(answer.json()["detail"])) == (400, True)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("body", [{"data": {"other": "x"}}, {"content": b"raw"}, {"files": {"wrong": b"x"}}])
def test_an_upload_without_a_part_named_file_is_422_and_leaves_nothing(
    server: RunningServer, tmp_path: Path, body: dict[str, object]
) -> None:
    answer = server.http.post("/api/file/upload", params={"path": str(tmp_path / "x")}, **body)
    assert answer.status_code == 422
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_breaks_off_leaves_the_old_file_and_no_other(server: RunningServer, tmp_path: Path) -> None:
    import socket

    target = tmp_path / "x"
    target.write_text("old")
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(server.socket))
        head = f"PUT /api/file/raw?path={target} HTTP/1.1\r\nHost: x\r\nX-Session-API-Key: {KEY}\r\n"
        raw.sendall(head.encode() + b"Content-Length: 9000000\r\n\r\n" + b"n" * 2_000_000)
        eventually(lambda: len(list(tmp_path.iterdir())) == 2)
    eventually(lambda: list(tmp_path.iterdir()) == [target])
    assert target.read_text() == "old"
