"""The server's log reaches a logger line by line, without what could steer a terminal."""

import logging
from pathlib import Path

import pytest

from hpc_workspace import ApptainerWorkspace
from hpc_workspace.logs import LogFollower
from hpc_workspace.rendezvous import state_dir


def test_lines_written_before_and_after_the_start_are_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log"
    path.write_text("one\n")
    with caplog.at_level(logging.INFO, "test"):
        follower = LogFollower(path, logging.getLogger("test"), "ws")
        with path.open("a") as file:
            file.write("t\x1b[31mwo\nhalf")
        follower.close()
    assert caplog.messages == ["ws: one", "ws: t[31mwo", "ws: half"]


def test_a_workspace_follows_its_log_only_where_somebody_listens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hpc_workspace.server_log")
    with ApptainerWorkspace(runtime="process") as workspace:
        log = state_dir() / "workspaces" / workspace.id / "server.log"
        log.write_text("said by the server\n")
    assert f"{workspace.id}: said by the server" in caplog.messages
