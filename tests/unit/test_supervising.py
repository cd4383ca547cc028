"""The shell that supervises a command on OpenHands' server, run as that server runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from hpc_workspace.client import supervising
from tests.unit.server.running import is_alive


class Run:
    """One supervised command, its files below `folder`."""

    def __init__(self, folder: Path, command: str, shell: str = "sh", **options: object) -> None:
        self.id = uuid.uuid4().hex
        self.folder = folder / "run"
        given = {"cwd": str(folder), "env": {}, "is_told": True} | options
        text = supervising.supervised(command, command_id=self.id, **given)  # type: ignore[arg-type]
        self.process = subprocess.Popen(
            [shell, "-c", self.here(text)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    def here(self, text: str) -> str:
        return text.replace(supervising.FOLDER, str(self.folder))

    def file(self, kind: str) -> bytes:
        return (self.folder / f"{self.id}.{kind}").read_bytes()

    def end(self) -> tuple[bytes, bytes, str]:
        """Stdout, stderr and what was said of the end."""
        out, err = self.process.communicate(timeout=30)
        err, _, code = err.rpartition(f"\n{self.id} ".encode())
        return out, err, code.decode().strip()


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(
    ("command", "code"),
    [("true", "0"), ("exit 7", "7"), ("exit 137", "137"), ("kill -9 $$", "-9"), ("kill -TERM $$", "-15"),
     ("kill -SEGV $$", "-11"), ("exit 143", "143"), ("kill -INT $$", "130"), ("kill -PIPE $$", "141")],
)  # fmt: skip
def test_a_signal_is_told_from_an_exit_code_where_the_shell_can(
    tmp_path: Path, shell: str, command: str, code: str
) -> None:
    run = Run(tmp_path, command, shell)
    assert run.end() == (b"", b"", code)
    assert run.file("end").decode().strip() == code


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_output_is_whole_in_files_and_its_beginning_is_told(tmp_path: Path, shell: str) -> None:
    run = Run(tmp_path, r"printf 'a\0\377'; head -c 100000 /dev/zero >&2", shell)
    out, err, code = run.end()
    assert (out, len(err), code) == (b"a\0\xff", supervising.TOLD_BYTES + 1, "0")
    assert (run.file("out"), len(run.file("err"))) == (b"a\0\xff", 100000)


def test_its_directory_is_for_its_user_alone_and_the_command_s_umask_is_untouched(tmp_path: Path) -> None:
    run = Run(tmp_path, "umask")
    own = subprocess.run(["sh", "-c", "umask"], capture_output=True, check=True).stdout
    assert run.end()[0] == own
    assert run.folder.stat().st_mode & 0o777 == 0o700


def test_a_child_in_the_background_holds_nothing_up(tmp_path: Path) -> None:
    run = Run(tmp_path, "sleep 20 & echo $!")
    pid = int(run.end()[0])
    os.kill(pid, signal.SIGKILL)


def test_signals_are_not_ignored_by_the_command(tmp_path: Path) -> None:
    out, _, _ = Run(tmp_path, "grep SigIgn /proc/self/status", timer_s=30).end()
    ignored = int(out.split()[1], 16)
    assert not ignored & (1 << (signal.SIGTERM - 1) | 1 << (signal.SIGINT - 1) | 1 << (signal.SIGQUIT - 1))


def test_a_timer_ends_all_that_was_started_and_leaves_no_process_behind(tmp_path: Path) -> None:
    run = Run(tmp_path, "trap '' TERM; setsid sleep 72 & echo $!; sleep 72", timer_s=0.3)
    out, _, code = run.end()
    assert code == supervising.TIMED_OUT
    assert not is_alive(int(out))


def test_a_timer_that_is_not_needed_ends_with_the_command(tmp_path: Path) -> None:
    run = Run(tmp_path, "true", timer_s=74.25)
    run.end()
    # Its processes are in the shell's group, which is gone when all of them are.
    with pytest.raises(ProcessLookupError):
        while True:
            os.killpg(run.process.pid, 0)


def test_the_ending_text_ends_it_and_says_so_where_there_is_none(tmp_path: Path) -> None:
    run = Run(tmp_path, "setsid sleep 75 & echo on; sleep 75", is_told=False)
    while not (run.folder / f"{run.id}.out").exists() or not run.file("out"):
        assert run.process.poll() is None
    for _ in range(2):
        subprocess.run(["sh", "-c", run.here(supervising.ending(run.id))], check=True, timeout=30)
    assert run.file("end").decode().strip() == "-15"
    run.process.wait(10)
    run.end()
    unknown = run.here(supervising.ending(uuid.uuid4().hex))
    assert subprocess.run(["sh", "-c", unknown], check=False, timeout=30).returncode == supervising.UNKNOWN


def test_one_that_was_killed_with_its_shell_is_missed(tmp_path: Path) -> None:
    run = Run(tmp_path, "kill -9 0", is_told=False)
    run.process.communicate(timeout=30)
    assert run.process.returncode == -9
    assert subprocess.run(["sh", "-c", run.here(supervising.asking(run.id))], check=False).returncode == 1


@pytest.mark.parametrize("cwd", ["/does/not/exist", "/etc/passwd"])
def test_one_that_can_not_start_says_so(tmp_path: Path, cwd: str) -> None:
    run = Run(tmp_path, "touch /tmp/never", cwd=cwd)
    assert run.end()[2] == supervising.NOT_STARTED
    assert run.file("end").decode().strip() == supervising.NOT_STARTED


def test_files_of_spent_commands_are_removed(tmp_path: Path) -> None:
    first = Run(tmp_path, "echo x")
    first.end()
    second = Run(tmp_path, "true", spent=[first.id])
    second.end()
    while list(second.folder.glob(f"{first.id}.*")):
        assert second.folder.exists()
    assert list(second.folder.glob(f"{second.id}.*"))


@pytest.mark.parametrize("name", ["A-B", "", "X; touch /tmp/x", "1A", "ü"])
def test_a_variable_s_name_is_no_place_for_shell(name: str) -> None:
    with pytest.raises(ValueError, match="variable name"):
        supervising.supervised("true", command_id="x", cwd="/", env={name: "v"})
