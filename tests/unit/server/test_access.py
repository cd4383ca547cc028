"""Claims about who is served, and about start and stop."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route
from websockets.exceptions import InvalidStatus
from websockets.sync.client import unix_connect

from hpc_workspace.server.auth import OPEN_PATHS
from hpc_workspace.server.bash_routes import bash_routes
from hpc_workspace.server.files import file_routes
from hpc_workspace.server.git import git_routes
from hpc_workspace.server.settings import Settings
from hpc_workspace.server.table import CommandTable
from tests.unit.server.running import KEY, RunningServer, eventually, is_alive, write_config


def _shut_routes() -> list[tuple[str, str]]:
    """Method and path of every /api route of the application."""
    table = CommandTable(Settings((KEY,), "/tmp", Path("/tmp")))
    routes: list[Route] = [*bash_routes(table), *file_routes(), *git_routes(dict)]
    return [(method, route.path) for route in routes for method in sorted(route.methods or ())]


@pytest.mark.parametrize(("method", "path"), _shut_routes())
@pytest.mark.parametrize("headers", [{}, {"X-Session-API-Key": "wrong"}, {"X-Session-API-Key": KEY[:-1]}])
def test_no_api_route_is_served_without_the_key(
    server: RunningServer, method: str, path: str, headers: dict[str, str]
) -> None:
    with server.client(headers=headers) as stranger:
        assert stranger.request(method, path.replace("{", "").replace("}", "")).status_code == 401


def test_all_but_four_paths_are_shut_whether_they_exist_or_not(server: RunningServer) -> None:
    with server.client(headers={}) as stranger:
        assert {path: stranger.get(path).status_code for path in OPEN_PATHS} == dict.fromkeys(OPEN_PATHS, 200)
        for path in ("/", "/docs", "/api", "/api/nothing", "/health/x", "//health"):
            assert stranger.get(path).status_code == 401


def test_a_socket_without_the_key_is_refused_with_401(server: RunningServer) -> None:
    for query in ("", "?session_api_key=wrong"):
        with (
            pytest.raises(InvalidStatus) as refused,
            unix_connect(str(server.socket), f"ws://server/sockets/bash-events{query}"),
        ):
            pass
        assert refused.value.response.status_code == 401


def test_the_unix_socket_is_the_owner_s_alone(server: RunningServer) -> None:
    assert stat.S_IMODE(server.socket.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("changes", [{"session_api_keys": []}, {"session_api_keys": [""]}, {"spool_dir": None}])
def test_it_does_not_start_without_a_key_or_a_place(tmp_path: Path, changes: dict[str, object]) -> None:
    ended = _try_start(tmp_path, {"HPC_WORKSPACE_SERVER_CONFIG": str(write_config(tmp_path, **changes))})
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


def test_it_does_not_start_without_a_config_or_with_one_that_others_can_read(tmp_path: Path) -> None:
    assert _try_start(tmp_path, {}).returncode == 2
    config = write_config(tmp_path)
    config.chmod(0o644)
    ended = _try_start(tmp_path, {"HPC_WORKSPACE_SERVER_CONFIG": str(config)})
    assert (ended.returncode, KEY in ended.stderr) == (2, False)


def test_a_port_is_one_of_127_0_0_1(tmp_path: Path) -> None:
    from tests.unit.server.ports import free_port

    port = free_port()
    environment = {**os.environ, "HPC_WORKSPACE_SERVER_CONFIG": str(write_config(tmp_path))}
    process = subprocess.Popen([sys.executable, "-m", "hpc_workspace.server", "--port", str(port)], env=environment)
    try:
        eventually(lambda: _health(port))
        listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        addresses = [line.split()[1] for line in listening.splitlines() if f":{port:04X} " in line and " 0A " in line]
        assert addresses == [f"0100007F:{port:04X}"]
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_server_and_commands_at_once(tmp_path: Path, number: signal.Signals) -> None:
    running = RunningServer(tmp_path)
    try:
        running.start("trap '' TERM; echo $$ > pid; sleep 69; sleep 69")
        pid = int(eventually(lambda: (tmp_path / "ws/pid").exists() and (tmp_path / "ws/pid").read_text()))
        begun = time.monotonic()
        running.process.send_signal(number)
        assert running.process.wait(timeout=10) == 0
        assert time.monotonic() - begun < 0.6
        assert not is_alive(pid)
        assert not running.socket.exists()
    finally:
        running.stop()


def test_it_needs_no_pydantic_and_nothing_else_of_this_package() -> None:
    program = (
        "import sys; import hpc_workspace.server.app, hpc_workspace.server.launch, uvicorn;"
        "print(*(m for m in sys.modules if m.startswith(('pydantic', 'httpx', 'hpc_workspace'))))"
    )
    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    allowed = {"hpc_workspace", "hpc_workspace.version", "hpc_workspace.server"}
    assert [name for name in seen if name not in allowed and not name.startswith("hpc_workspace.server.")] == []


def _try_start(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HPC_WORKSPACE_")}
    argv = [sys.executable, "-m", "hpc_workspace.server", "--uds", str(folder / "s")]
    return subprocess.run(argv, env=inherited | environment, capture_output=True, text=True, timeout=20, check=False)


def _health(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
