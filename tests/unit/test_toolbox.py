"""Claims about the toolbox: made here, run from elsewhere, in a root directory that holds nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from hpc_workspace.toolbox import MANIFEST, ensure_toolbox, toolbox_argv
from tests.conftest import skip_or_fail
from tests.unit.server.running import HEADERS, eventually, write_config


@pytest.fixture(scope="module")
def toolbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_toolbox(tmp_path_factory.mktemp("store") / "root")


def _python(mount: str) -> list[str]:
    """The interpreter alone, as `toolbox_argv` starts it."""
    return toolbox_argv(mount)[:-1]


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


def test_racing_makers_end_with_one_whole_toolbox(tmp_path: Path) -> None:
    found: list[Path] = []
    makers = [threading.Thread(target=lambda: found.append(ensure_toolbox(tmp_path / "root"))) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert found[0] == found[1]
    assert list((tmp_path / "root").iterdir()) == [found[0]]


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


def test_the_server_serves_in_a_root_that_holds_nothing_else(bare_root: Path) -> None:
    run = bare_root / "run"
    run.mkdir()
    write_config(run, working_dir="/workspace", spool_dir="/run/spool")
    argv = [str(shutil.which("chroot")), str(bare_root), *toolbox_argv("/.hw"), "--uds", "/run/s"]
    process = subprocess.Popen(argv, env={"HPC_WORKSPACE_SERVER_CONFIG": "/run/config.json"})
    try:
        transport = httpx.HTTPTransport(uds=str(run / "s"))
        with httpx.Client(transport=transport, base_url="http://server", headers=HEADERS) as client:
            eventually(lambda: (run / "s").exists())
            assert client.get("/health").json() == {"status": "ok"}
            client.put("/api/file/raw", params={"path": "/workspace/x"}, content=b"y")
            assert (bare_root / "workspace" / "x").read_bytes() == b"y"
            answer = client.post("/api/bash/execute_bash_command", json={"command": "true"})
            assert answer.status_code == 422  # there is no shell: said, not a crash
    finally:
        process.terminate()
        assert process.wait(timeout=10) == 0
