"""Claims about the toolbox: made here, run from elsewhere, in a root directory that holds nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hpc_workspace.errors import PrerequisiteError
from hpc_workspace.server import layout
from hpc_workspace.server.git import find_git
from hpc_workspace.server.requests import RequestError
from hpc_workspace.toolbox import (
    MANIFEST,
    _put_in_place,
    ensure_toolbox,
    list_parts,
    list_toolboxes,
    verify_toolbox,
)
from tests.conftest import skip_or_fail
from tests.unit.server.running import HEADERS, eventually, write_config

ENSURE = "import sys, pathlib; from hpc_workspace.toolbox import ensure_toolbox; print(ensure_toolbox(pathlib.Path(sys.argv[1])))"
DAY_S = 24 * 3600.0


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_toolbox(tmp_path_factory.mktemp("store") / "root")


@pytest.fixture
def copied(toolbox: Path, tmp_path: Path) -> Path:
    """A toolbox of links to the files of the real one: what is changed must be replaced."""
    copy = tmp_path / "root" / toolbox.name
    shutil.copytree(toolbox, copy, copy_function=os.link)
    return copy


def _replace(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def _python(mount: str) -> list[str]:
    """The interpreter alone, as `server_argv` starts it."""
    return layout.python_argv(mount)


def _needs_git_here() -> None:
    if shutil.which("git") is None:
        skip_or_fail("git is not installed")


@pytest.fixture
def bare_root(toolbox: Path, tmp_path: Path) -> Path:
    """A root directory with the toolbox at /.hw and nothing else: no libc, no /usr, no shell, no /proc."""
    if os.geteuid() != 0 or shutil.which("chroot") is None:
        skip_or_fail("chroot needs root")
    root = tmp_path / "bare"
    root.mkdir()
    shutil.copytree(toolbox, root / ".hw", copy_function=os.link)
    return root


def test_it_is_made_once_and_private(toolbox: Path) -> None:
    made = (toolbox / MANIFEST).stat().st_mtime_ns
    assert ensure_toolbox(toolbox.parent) == toolbox
    assert (toolbox / MANIFEST).stat().st_mtime_ns == made
    assert toolbox.parent.stat().st_mode & 0o077 == 0
    assert list(toolbox.parent.iterdir()) == [toolbox]


def test_its_manifest_counts_what_is_there(toolbox: Path) -> None:
    manifest = json.loads((toolbox / MANIFEST).read_text())
    files = [file for file in toolbox.rglob("*") if file.is_file() and file.name != MANIFEST]
    assert manifest["files"] == len(files)
    assert manifest["digests"].keys() == {file.relative_to(toolbox).as_posix() for file in files}
    assert manifest["bytes"] == sum(file.stat().st_size for file in files)
    assert toolbox.name == f"toolbox-{manifest['key']}"


def test_it_holds_no_tests_and_no_bytecode_for_optimised_runs(toolbox: Path) -> None:
    assert not [path for path in toolbox.rglob("*") if path.name in ("idlelib", "tkinter", "ensurepip", "pydantic")]
    assert not list(toolbox.rglob("*.opt-?.pyc"))


def test_every_module_of_the_server_comes_with_bytecode(toolbox: Path) -> None:
    sources = list((toolbox / "site" / "hpc_workspace").rglob("*.py"))
    assert len(sources) > 10
    for source in sources:
        assert list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")), source


def test_a_whole_one_has_nothing_wrong(toolbox: Path) -> None:
    assert verify_toolbox(toolbox) == []


def test_what_is_missing_changed_or_extra_is_said(copied: Path) -> None:
    (copied / "lib" / "ld.so").unlink()
    _replace(copied / "serve.py", "print('mine')")
    _replace(copied / "site" / "hpc_workspace" / "version.py", "")
    (copied / "site" / "extra.py").symlink_to("/etc/passwd")
    os.mkfifo(copied / "fifo")
    assert verify_toolbox(copied) == [
        "fifo does not belong there.",
        "lib/ld.so is missing.",
        "serve.py was changed.",
        "site/extra.py does not belong there.",
        "site/hpc_workspace/version.py was changed.",
    ]


def test_a_link_is_what_it_points_to(copied: Path) -> None:
    (copied / "serve.py").unlink()
    (copied / "serve.py").symlink_to(copied / "elsewhere.py")
    assert verify_toolbox(copied) == ["serve.py was changed."]


def test_one_without_a_manifest_or_of_another_name_or_open_to_others_has_that_wrong(copied: Path) -> None:
    copied.chmod(0o775)
    moved = copied.rename(copied.with_name("toolbox-3.0.0-000000000000"))
    wrong = verify_toolbox(moved)
    assert len(wrong) == 2
    assert "0775" in wrong[0]
    assert "another toolbox" in wrong[1]
    (moved / MANIFEST).unlink()
    assert "is missing" in verify_toolbox(moved)[1]
    assert "can't be looked at" in verify_toolbox(copied / "absent")[0]


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_one_that_others_can_write_is_refused_by_its_name(copied: Path, mode: int) -> None:
    copied.chmod(mode)
    with pytest.raises(PrerequisiteError) as refused:
        ensure_toolbox(copied.parent)
    assert str(copied) in refused.value.what
    assert f"{mode:04o}" in refused.value.evidence
    assert "Remove" in refused.value.remedy


def test_one_of_another_user_is_refused_whatever_it_holds(copied: Path) -> None:
    if os.geteuid() != 0:
        skip_or_fail("chown needs root")
    (copied / MANIFEST).unlink()
    os.chown(copied, 12345, -1)
    with pytest.raises(PrerequisiteError, match="12345"):
        ensure_toolbox(copied.parent)
    assert copied.stat().st_uid == 12345


def test_one_whose_manifest_is_of_another_is_refused(copied: Path) -> None:
    _replace(copied / MANIFEST, json.dumps({"key": "3.0.0-000000000000"}))
    with pytest.raises(PrerequisiteError, match=r"3\.0\.0-000000000000"):
        ensure_toolbox(copied.parent)


@pytest.mark.parametrize("manifest", [None, '{"key": "3.1', "[]"])
def test_one_that_was_interrupted_is_replaced(copied: Path, manifest: str | None) -> None:
    (copied / MANIFEST).unlink()
    if manifest is not None:
        (copied / MANIFEST).write_text(manifest)
    (copied / "serve.py").unlink()
    before = copied.stat().st_ino
    assert ensure_toolbox(copied.parent) == copied
    assert copied.stat().st_ino != before
    assert verify_toolbox(copied) == []
    assert list_toolboxes(copied.parent) == [copied]
    for part in list_parts(copied.parent):  # what is left of it holds the place of its name, and no more
        assert [path.name for path in part.iterdir()] == ["broken"]


def test_whoever_comes_late_does_not_take_away_what_another_has_put_there(tmp_path: Path) -> None:
    def part(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
        return tmp_path / name

    target = tmp_path / "toolbox-x"
    target.mkdir()
    late = os.open(target, os.O_RDONLY)  # as one that has looked, and found it broken
    _put_in_place(part("first"), target)
    number = os.fstat(late).st_ino
    os.close(late)
    whole = target.stat().st_ino
    with pytest.raises(OSError, match=r"not empty|exists"):
        target.rename(tmp_path / f".toolbox-x.{number}.part")  # what it would do next
    _put_in_place(part("second"), target)
    assert target.stat().st_ino == whole
    assert (tmp_path / "second").is_dir()


def test_what_a_killed_maker_left_is_never_used(toolbox: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    left = root / f".{toolbox.name}.0123456789ab.part"
    left.mkdir(parents=True)
    (left / MANIFEST).write_text((toolbox / MANIFEST).read_text())
    (root / "python-3.12-0123456789abcdef.sif").touch()
    made = ensure_toolbox(root)
    assert verify_toolbox(made) == []
    assert list_toolboxes(root) == [made]
    assert list_parts(root) == [left]
    assert list_toolboxes(tmp_path / "absent") == list_parts(tmp_path / "absent") == []


def test_its_use_is_noted_to_a_day(copied: Path) -> None:
    manifest = copied / MANIFEST
    _replace(manifest, manifest.read_text())
    for age_s, is_noted in ((DAY_S / 2, False), (2 * DAY_S, True)):
        then = time.time() - age_s
        os.utime(manifest, (then, then))
        ensure_toolbox(copied.parent)
        assert (manifest.stat().st_mtime > then + 60) is is_noted


def test_racing_threads_end_with_one_whole_toolbox(tmp_path: Path) -> None:
    found: list[Path] = []
    makers = [threading.Thread(target=lambda: found.append(ensure_toolbox(tmp_path / "root"))) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert found[0] == found[1]
    assert list((tmp_path / "root").iterdir()) == [found[0]]


def test_racing_processes_replace_a_broken_one_once_and_closed_to_the_group(copied: Path) -> None:
    root = copied.parent
    (copied / MANIFEST).unlink()
    argv = [sys.executable, "-c", ENSURE, str(root)]
    makers = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, umask=0o002) for _ in range(4)]
    assert [maker.communicate()[0].strip() for maker in makers] == [str(copied)] * 4
    assert verify_toolbox(copied) == []
    assert not [path for path in copied.rglob("*") if path.stat().st_mode & 0o022]
    assert len(list_parts(root)) == 1


def test_one_that_does_not_run_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An ldd that names the loader and nothing else, so that the C library would be the image's, if it has one.
    _program(tmp_path / "bin" / "ldd", f"#!/bin/sh\n{shutil.which('ldd')} \"$@\" | grep -v '=>'\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(PrerequisiteError) as refused:
        ensure_toolbox(tmp_path / "root")
    assert "does not run" in refused.value.what
    assert re.search(r"libc\.so|libc\b", refused.value.evidence)
    assert list((tmp_path / "root").iterdir()) == []


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_its_git_is_the_binary_behind_a_script_on_path(
    toolbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _needs_git_here()
    _program(tmp_path / "bin" / "git", f'#!/bin/sh\nexec {shutil.which("git")} "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    made = ensure_toolbox(tmp_path / "root")
    assert (made / "git/bin/git").read_bytes()[:4] == b"\x7fELF"
    assert json.loads((made / MANIFEST).read_text())["git"] == json.loads((toolbox / MANIFEST).read_text())["git"]


def test_with_a_short_path_it_is_the_same_one(toolbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _needs_git_here()
    if Path(str(shutil.which("git"))) not in (Path("/usr/bin/git"), Path("/bin/git")):
        skip_or_fail("the git on PATH is not the system's")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ensure_toolbox(tmp_path / "root").name == toolbox.name


def test_without_a_git_that_runs_it_is_another_one_without_git(
    toolbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(str(shutil.which("false")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    made = ensure_toolbox(tmp_path / "root")
    assert (made.name != toolbox.name) == (json.loads((toolbox / MANIFEST).read_text())["git"] is not None)
    assert json.loads((made / MANIFEST).read_text())["git"] is None
    assert not (made / "git").exists()


def test_an_image_s_own_git_comes_first_then_the_toolbox_s_then_none(toolbox: Path, tmp_path: Path) -> None:
    _needs_git_here()
    version = json.loads((toolbox / MANIFEST).read_text())["git"]
    answer = asyncio.run(find_git({"PATH": str(tmp_path / "bin")}, str(toolbox))(tmp_path, "version"))
    assert answer.decode().strip() == f"git version {version}"
    with pytest.raises(RequestError, match="toolbox was made") as refused:
        find_git({"PATH": str(tmp_path / "bin")}, str(tmp_path))
    assert refused.value.status == 501
    _program(tmp_path / "bin" / "git", "#!/bin/sh\necho its own\n")
    answer = asyncio.run(find_git({"PATH": str(tmp_path / "bin")}, str(toolbox))(tmp_path, "version"))
    assert answer == b"its own\n"


def test_the_toolbox_s_git_takes_no_library_and_no_program_of_the_image(toolbox: Path, tmp_path: Path) -> None:
    _needs_git_here()
    broken = {
        "LD_PRELOAD": "/nowhere/x.so",
        "LD_LIBRARY_PATH": "/nowhere",
        "GIT_EXEC_PATH": "/nowhere",
        "PATH": "/nowhere",
    }
    git = find_git(broken, str(toolbox))
    assert asyncio.run(git(tmp_path, "--exec-path")).decode().strip() == str(toolbox / "git/exec")
    assert asyncio.run(git(tmp_path, "version")).startswith(b"git version")


def test_it_runs_from_a_place_it_was_moved_to(toolbox: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved here"
    shutil.copytree(toolbox, moved, copy_function=os.link)
    program = "import sys, ssl, sqlite3, ctypes; print(ssl.__file__, [p for p in sys.path])"
    ended = subprocess.run([*_python(str(moved)), "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(str(moved))


def test_it_takes_nothing_of_the_image_s_python(toolbox: Path, tmp_path: Path) -> None:
    (tmp_path / "ssl.py").write_text("raise SystemExit('the image was imported')")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nowhere", "LD_LIBRARY_PATH": "/nowhere"}
    argv = [*_python(str(toolbox)), "-c", "import ssl; print('its own')"]
    ended = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == "its own\n"


def test_every_extension_module_loads_in_a_root_that_holds_nothing_else(bare_root: Path) -> None:
    program = (
        "import ssl, sqlite3, ctypes, lzma, bz2, zlib, hashlib, asyncio, uuid, multiprocessing, decimal; print('ok')"
    )
    argv = ["chroot", str(bare_root), *_python("/.hw"), "-c", program]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("ok\n", "")


@contextlib.contextmanager
def _serving(bare_root: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """The server in the bare root, answering; TERM must end it."""
    run = bare_root / "run"
    run.mkdir()
    write_config(run, working_dir="/workspace", spool_dir="/run/spool")
    argv = [str(shutil.which("chroot")), str(bare_root), *layout.server_argv("/.hw"), "--uds", "/run/s"]
    environment = {
        "HPC_WORKSPACE_SERVER_CONFIG": "/run/config.json",
        "HPC_WORKSPACE_SESSION": "the mark",
        "PATH": "/bin",
        "HOME": "/workspace",
    }
    process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        transport = httpx.HTTPTransport(uds=str(run / "s"))
        with httpx.Client(transport=transport, base_url="http://server", headers=HEADERS, timeout=30) as client:
            eventually(lambda: _answers(client))
            yield client, process
    finally:
        process.terminate()
        assert process.wait(timeout=10) == 0


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").json() == {"status": "ok"}
    except httpx.TransportError:
        return False


def _add_shell(bare_root: Path) -> None:
    """This machine's sh, with what it needs, in the bare root; a file for /dev/null, and no /proc."""
    said = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True, check=True).stdout
    for path in ["/bin/sh", *re.findall(r"(/\S+) \(0x", said)]:
        target = bare_root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.realpath(path), target)
    (bare_root / "dev").mkdir()
    (bare_root / "dev/null").touch()


def _add_entrypoint(bare_root: Path, text: str) -> None:
    _program(bare_root / "entrypoint.sh", text)
    _program(bare_root / ".singularity.d/runscript", "#!/bin/sh\nOCI_ENTRYPOINT='\"/entrypoint.sh\"'\nOCI_CMD=''\n")


def test_the_server_serves_in_a_root_that_holds_nothing_else(bare_root: Path) -> None:
    with _serving(bare_root) as (client, _):
        client.put("/api/file/raw", params={"path": "/workspace/x"}, content=b"y")
        assert (bare_root / "workspace" / "x").read_bytes() == b"y"
        answer = client.post("/api/bash/execute_bash_command", json={"command": "true"})
        assert answer.status_code == 422  # there is no shell: said, not a crash


def _repository(root: Path) -> Path:
    """A repository with a submodule, and edits in both."""
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "protocol.file.allow=always"]

    def git(where: Path, *words: str) -> None:
        subprocess.run(["git", "-C", str(where), *identity, *words], check=True, capture_output=True)

    for name in ("inner", "outer"):
        (root / name).mkdir(parents=True)
        git(root / name, "init", "-q")
        (root / name / "kept").write_text("one\n")
        git(root / name, "add", ".")
        git(root / name, "commit", "-qm", "first")
    git(root / "outer", "submodule", "add", "-q", str(root / "inner"), "sub")
    git(root / "outer", "commit", "-qm", "second")
    (root / "outer" / "kept").write_text("two\n")
    (root / "outer" / "sub" / "kept").write_text("two\n")
    return root / "outer"


def test_git_answers_where_there_is_none_and_commands_do_not_see_it(bare_root: Path) -> None:
    _needs_git_here()
    _add_shell(bare_root)
    _repository(bare_root / "repositories")
    with _serving(bare_root) as (client, _):
        answer = client.get("/api/git/changes", params={"path": "/repositories/outer"})
        assert answer.json() == [
            {"status": "UPDATED", "path": "kept"},
            {"status": "UPDATED", "path": "sub/kept"},
        ]
        answer = client.get("/api/git/diff", params={"path": "/repositories/outer/kept"})
        assert answer.json() == {"modified": "two", "original": "one"}
        seen = client.post("/api/bash/execute_bash_command", json={"command": "command -v git; set"}).json()["stdout"]
        assert "GIT_" not in seen
        assert ".hw" not in seen


def test_the_toolbox_s_git_refuses_a_stranger_s_repository_as_any_git_does(bare_root: Path) -> None:
    _needs_git_here()
    _add_shell(bare_root)
    repository = _repository(bare_root / "repositories")
    for path in (repository, repository / ".git"):
        os.chown(path, 12345, -1)
    (bare_root / "etc").mkdir(exist_ok=True)
    (bare_root / "etc/gitconfig").write_text("[safe]\n\tdirectory = *\n")  # the image's system configuration
    with _serving(bare_root) as (client, _):

        def changes() -> list[str]:
            answer = client.get("/api/git/changes", params={"path": "/repositories/outer"})
            return [change["path"] for change in answer.json()]

        assert "kept" not in changes()
        (bare_root / "workspace/.gitconfig").write_text("[safe]\n\tdirectory = *\n")  # what the user says himself
        assert "kept" in changes()


def test_commands_and_git_find_what_the_image_s_entrypoint_sets(bare_root: Path) -> None:
    _add_shell(bare_root)
    _program(bare_root / "tools/git", "#!/bin/sh\necho $FROM_ENTRYPOINT >&2\nexit 1\n")
    _add_entrypoint(
        bare_root,
        '#!/bin/sh\necho a banner\nexport FROM_ENTRYPOINT="set; $HPC_WORKSPACE_SERVER_CONFIG"\n'
        'export PATH="/tools:$PATH"\nexec "$@"\n',
    )
    with _serving(bare_root) as (client, _):
        command = 'printf "%s|" "$FROM_ENTRYPOINT" "$PATH" "$HPC_WORKSPACE_SESSION" "$HPC_WORKSPACE_SERVER_CONFIG"'
        answer = client.post("/api/bash/execute_bash_command", json={"command": command}).json()
        assert answer["stdout"] == "set; |/tools:/bin|the mark||"
        answer = client.get("/api/git/diff", params={"path": "/workspace/x", "ref": "HEAD"})
        assert answer.status_code == 400  # this git finds no repository anywhere
    assert [path.name for path in (bare_root / "run/spool").iterdir()] == []


def test_an_entrypoint_that_fails_is_one_line_in_the_log(bare_root: Path) -> None:
    _add_shell(bare_root)
    _add_entrypoint(bare_root, '#!/bin/sh\nexit 3\nexec "$@"\n')
    with _serving(bare_root) as (client, process):
        answer = client.post("/api/bash/execute_bash_command", json={"command": "echo $PATH"}).json()
        assert answer["stdout"] == "/bin\n"
    assert process.stderr is not None
    log = process.stderr.read()
    assert len(log.splitlines()) == 1
    assert "/entrypoint.sh ended with exit code 3" in log


def test_the_server_does_not_listen_before_the_entrypoint_has_ended_and_a_signal_ends_both(bare_root: Path) -> None:
    _add_shell(bare_root)
    _add_entrypoint(bare_root, '#!/bin/sh\necho $$ > /pid\nwhile :; do :; done\nexec "$@"\n')
    run = bare_root / "run"
    run.mkdir()
    write_config(run, working_dir="/workspace", spool_dir="/run/spool")
    argv = [str(shutil.which("chroot")), str(bare_root), *layout.server_argv("/.hw"), "--uds", "/run/s"]
    process = subprocess.Popen(argv, env={"HPC_WORKSPACE_SERVER_CONFIG": "/run/config.json", "PATH": "/bin"})
    try:
        pid = int(eventually(lambda: (bare_root / "pid").exists() and (bare_root / "pid").read_text()))
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(run / "s")), base_url="http://server") as client:
            assert not _answers(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
        eventually(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        process.kill()
        process.wait()
