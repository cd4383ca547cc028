"""What `ps` and `logs` say, from the files alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_workspace import logs, overview
from hpc_workspace.cli.commands import cli
from hpc_workspace.cli.output import short_time
from hpc_workspace.rendezvous import WorkspaceDirectory
from tests.unit.test_rendezvous import make_record, make_spec


def make(number: int, **changes: object) -> WorkspaceDirectory:
    """A workspace's directory; with changes, its record too."""
    name = f"ws-{number:010d}"
    directory = WorkspaceDirectory.create(make_spec().model_copy(update={"workspace_id": name}), "t", {})
    if changes:
        directory.touch_heartbeat()
        directory.publish(make_record(**({"workspace_id": name} | changes)))
    return directory


def test_each_state_has_its_word() -> None:
    make(1)
    make(2, state="ready", time_left_s=60.0)
    make(3, state="ended")
    make(4, state="ended", may_restart=True)
    silent = make(5, state="ready")
    old_s = silent.heartbeat.stat().st_mtime - 500
    os.utime(silent.heartbeat, (old_s, old_s))
    broken = make(6, state="ready")
    (broken.path / "record.json").write_text("{")
    gone = make(7, state="ended", may_restart=True)
    gone.forget_secrets()
    found = {one.workspace_id[-1]: one for one in overview.look()}
    assert {number: one.state for number, one in found.items()} == {
        "1": "waiting", "2": "ready", "4": "requeued", "5": "silent", "6": "unreadable",
    }  # fmt: skip
    assert found["2"].age_s is not None
    assert found["2"].age_s < 60
    assert 0 < (found["2"].time_left_s or 0) <= 60
    assert "no sign of life for 50" in found["5"].notice
    assert "record.json" in found["6"].notice


def test_idle_time_travels_with_the_heartbeat() -> None:
    directory = make(1, state="ready")
    directory.touch_heartbeat(idle_s=754.0)
    (one,) = overview.look()
    assert one.state == "ready"
    assert 753 < (one.idle_s or 0) < 755
    directory.touch_heartbeat()
    assert overview.look()[0].idle_s == 0
    listed = CliRunner().invoke(cli, ["ps"]).output.splitlines()
    assert listed[0].split() == ["ID", "STATE", "NODE", "JOB", "RUNTIME", "AGE", "LEFT", "IDLE"]
    assert listed[1].split()[:2] == ["ws-0000000001", "ready"]
    assert listed[1].endswith("0s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.4, "59s"), (60, "1m"), (3599, "59m"), (3900, "1h05m"), (187_200, "2d04h")],
)
def test_times_areshort_time(seconds: float | None, text: str) -> None:
    assert short_time(seconds) == text


def test_a_log_that_grows_is_read_to_its_end_without_what_steers_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n\x1b[31mtwo\nth")
    looks = iter([False, True])

    def grow(_: float) -> None:
        with path.open("ab") as file:
            file.write(b"ree\nfour")

    assert list(logs.read_lines(path, until=lambda: next(looks), pause=grow)) == ["one", "[31mtwo", "three", "four"]


def test_following_ends_with_the_workspace() -> None:
    directory = make(1, state="ready")
    directory.server_log.write_text("first\n")
    found: list[str] = []
    first = threading.Event()

    def follow() -> None:
        for line in logs.read_lines(directory.server_log, until=directory.has_ended):
            found.append(line)
            first.set()

    reader = threading.Thread(target=follow)
    reader.start()
    assert first.wait(10)
    with directory.server_log.open("a") as file:
        file.write("last\n")
    directory.publish(make_record(workspace_id=directory.workspace_id, state="ended"))
    reader.join(10)
    assert found == ["first", "last"]


def test_logs_of_a_workspace_that_is_none_is_an_error_on_one_screen() -> None:
    ended = CliRunner().invoke(cli, ["logs", "ws-nosuch"])
    assert ended.exit_code != 0
    assert "There is no workspace 'ws-nosuch'" in str(ended.exception)
