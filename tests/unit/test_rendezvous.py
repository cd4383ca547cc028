"""The workspace directory: whole files, private modes, and distrust of what is read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpc_workspace.errors import RendezvousCorruptError
from hpc_workspace.record import Record, Spec
from hpc_workspace.rendezvous import WorkspaceDirectory, list_workspaces


def make_spec(workspace_id: str = "ws-0123456789") -> Spec:
    return Spec(
        workspace_id=workspace_id, launch_id="l1", runtime="process", server="bundled", image=None, toolbox=None,
        working_dir="/workspace", mount_dir=None, binds=[], use_fakeroot=True, enable_gpu=False, enable_docker_compat=True,
        disable_mount_locations=[], writable="overlay", health_check_timeout_s=1.0, ends_with_lease=True, idle_timeout_s=None,
    )  # fmt: skip


def make_record(**changes: object) -> Record:
    values: dict[str, object] = {
        "workspace_id": "ws-0123456789", "launch_id": "l1", "job_id": None, "restart_count": 0, "state": "ready",
        "node": "n01", "port": 4000, "socket": "/tmp/s", "owner": "n01 boot ns 1 2", "runtime": "process", "server": "bundled",
        "working_dir": "/w", "node_scratch": "/tmp/x", "started_at": 1.0,
    }  # fmt: skip
    return Record.model_validate(values | changes)


@pytest.fixture
def directory() -> WorkspaceDirectory:
    return WorkspaceDirectory.create(make_spec(), "t0ken", {"A": "1\n2"})


def test_every_file_is_0600_under_0700(directory: WorkspaceDirectory) -> None:
    directory.publish(make_record())
    directory.touch_heartbeat()
    directory.write_batch_script("#!/bin/sh\n")
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in directory.path.iterdir()} == {0o600}


def test_what_is_written_is_read(directory: WorkspaceDirectory) -> None:
    assert directory.read_record() is None
    directory.publish(make_record())
    assert directory.read_record() == make_record()
    assert directory.read_spec() == make_spec()
    assert directory.read_token() == "t0ken"
    assert directory.read_environment() == {"A": "1\n2"}
    assert [found.workspace_id for found in list_workspaces()] == ["ws-0123456789"]


def test_the_secrets_can_be_forgotten(directory: WorkspaceDirectory) -> None:
    directory.forget_secrets()
    with pytest.raises(RendezvousCorruptError, match="has ended"):
        directory.read_token()


def test_the_record_never_holds_the_token(directory: WorkspaceDirectory) -> None:
    directory.publish(make_record())
    files = [p for p in directory.path.iterdir() if p.name != "token"]
    assert not [p for p in files if b"t0ken" in p.read_bytes()]


def _open_to_others(path: Path) -> None:
    path.chmod(0o640)


def _linked(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


def _too_large(path: Path) -> None:
    path.write_bytes(b"{" + b" " * 300_000)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _foreign(path: Path) -> None:
    path.write_text(path.read_text().replace("ws-0123456789", "ws-9999999999"))


def _newer(path: Path) -> None:
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99').replace('"port"', '"gate"'))


def _not_a_file(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("spoil", [_open_to_others, _linked, _too_large, _half, _foreign, _newer, _not_a_file])
def test_a_spoiled_record_is_never_used(directory: WorkspaceDirectory, spoil: object) -> None:
    directory.publish(make_record())
    assert callable(spoil)
    spoil(directory.path / "record.json")
    with pytest.raises(RendezvousCorruptError):
        directory.read_record()


def test_the_heartbeats_age_is_known_once_there_is_one(directory: WorkspaceDirectory) -> None:
    assert directory.heartbeat_age_s() is None
    directory.touch_heartbeat()
    os.utime(directory.heartbeat, (1, 1))
    age = directory.heartbeat_age_s()
    assert age is not None
    assert age > 1000
