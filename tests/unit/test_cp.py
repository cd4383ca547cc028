"""`hpc-workspace cp`, against a real workspace without a container."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc_workspace import Workspace


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "data/sub/x").write_text("x\n")
    return tmp_path


def _cp(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "hpc_workspace.cli", "cp", *arguments]
    return subprocess.run(argv, input=stdin, capture_output=True, check=False)


def _list(w: Workspace, path: str) -> list[str]:
    return w.execute_command(f"cd {path} && find . | sort").stdout.split()


def test_a_directory_gets_the_name_it_is_given_and_goes_into_one_that_is_there(workspace: Workspace, cwd: Path) -> None:
    for _ in range(2):
        assert _cp("data", f"{workspace.id}:new").returncode == 0
    assert _list(workspace, "new") == [".", "./data", "./data/sub", "./data/sub/x", "./sub", "./sub/x"]


def test_the_first_letters_of_an_id_do_and_both_ways_work(workspace: Workspace, cwd: Path) -> None:
    short = workspace.id[:-2]
    assert _cp("-r", "data", f"{short}:two/").returncode == 0
    assert _cp("-q", f"{short}:two/data", f"{short}:two/data/sub/x", str(cwd / "data")).returncode == 0
    assert (cwd / "data/data/sub/x").read_text() == (cwd / "data/x").read_text() == "x\n"


def test_a_dash_is_stdin_and_stdout(workspace: Workspace, cwd: Path) -> None:
    data = bytes(range(256)) * 20_000
    assert _cp("-", f"{workspace.id}:piped", stdin=data).returncode == 0
    said = _cp(f"{workspace.id}:piped", "-")
    assert (said.returncode, said.stdout, said.stderr) == (0, data, b"")


def test_from_one_workspace_to_another_all_is_kept(workspace: Workspace, cwd: Path) -> None:
    (cwd / "data/sub/x").chmod(0o750)
    _cp("data", f"{workspace.id}:from")
    assert _cp(f"{workspace.id}:from", f"{workspace.id}:to").returncode == 0
    assert workspace.execute_command("stat -c %a to/sub/x").stdout == "750\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("data", "elsewhere"), 2, b"One side must be in a workspace"),
        (("data", "data", "ID:no/where"), 2, b"no directory"),
        (("-", "data", "ID:."), 2, b"one SRC alone"),
        (("absent", "ID:."), 255, b"absent can't be read: No such file or directory."),
        (("ID:absent", "."), 255, b"does not exist in the workspace."),
        (("data", "ws-nobody:x"), 255, b"There is no workspace"),
        (("ID:new", "data/sub/x"), 255, b"can't be written"),
    ],
)
def test_what_is_wrong_is_said_with_an_exit_code(
    workspace: Workspace, cwd: Path, arguments: tuple[str, ...], code: int, said: bytes
) -> None:
    workspace.execute_command("mkdir -p new")
    ended = _cp(*(argument.replace("ID", workspace.id) for argument in arguments))
    assert ended.returncode == code
    assert said in ended.stderr
    assert b"Traceback" not in ended.stderr
