"""The routes through one command: one for all streams of a node, made anew when it died; `ssh` and `srun` are programs
on PATH that run the command here.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpc_workspace import procfs
from hpc_workspace.connect.multiplexed import SrunRoute, SshCommandRoute, build_srun_argv, build_ssh_argv
from hpc_workspace.errors import TunnelError
from hpc_workspace.record import Record
from tests.listeners import Listeners

PACKAGE = str(Path(__file__).parents[2])
RUN_HERE = """#!/bin/sh
echo $$ "$@" >> {log}
[ -z "$SLURM_JOB_ID" ] || echo "a surrounding job" >> {log}
echo "Welcome to n02"
{before}
while [ "$1" != {python} ] && [ $# -gt 1 ]; do shift; done
[ $# -gt 1 ] && exec "$@"
eval "exec $1"
"""


class Site:
    """A PATH with an `ssh` and an `srun`, and a door's two listeners."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.listeners = Listeners(directory)
        self.log = directory / "log"
        self.let()

    def let(self, before: str = "") -> None:
        """From now on, `before` happens first."""
        for name in ("ssh", "srun"):
            program = self.directory / name
            program.write_text(RUN_HERE.format(log=self.log, before=before, python=sys.executable))
            program.chmod(0o755)

    def record(self, **changes: object) -> Record:
        known: dict[str, object] = {
            "workspace_id": "ws-0123456789", "launch_id": "l", "job_id": "7", "restart_count": 0, "state": "ready",
            "node": "n02", "port": self.listeners.port, "socket": str(self.listeners.path), "python": sys.executable,
            "package": PACKAGE, "owner": "o", "runtime": "process", "server": "bundled", "working_dir": "/w",
            "node_scratch": "/t", "started_at": 0.0,
        }  # fmt: skip
        return Record.model_validate(known | changes)

    @property
    def started(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    made = Site(tmp_path)
    yield made
    made.listeners.close()


ROUTES = pytest.mark.parametrize("route_type", [SrunRoute, SshCommandRoute])
RouteType = type[SrunRoute] | type[SshCommandRoute]


def exchange(route: SrunRoute | SshCommandRoute) -> None:
    stream = route.open()
    stream.settimeout(20)
    stream.sendall(b"hello")
    assert stream.recv(5) == b"hello"
    stream.close()


def wait_gone(pid: int) -> None:
    """Until a process that is no child of this one's any more has ended."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([watched], [], [], 20)[0]
    os.close(watched)


@ROUTES
def test_all_workspaces_of_a_node_share_one_and_the_last_one_ends_it(site: Site, route_type: RouteType) -> None:
    routes = [route_type(site.record()), route_type(site.record(job_id="8"))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(exchange, routes * 8))
    assert len(site.started) == 1
    routes[0].close()
    exchange(routes[1])
    pid = int(site.started[0].split()[0])
    assert procfs.read_process(pid) is not None
    routes[1].close()
    routes[1].close()
    wait_gone(pid)
    with pytest.raises(TunnelError, match="is closed"):
        routes[1].open()
    assert len(site.started) == 1


@ROUTES
def test_closing_a_route_ends_its_streams_and_no_others(site: Site, route_type: RouteType) -> None:
    first, second = route_type(site.record()), route_type(site.record())
    mine, others = first.open(), second.open()
    first.close()
    assert mine.recv(1) == b""
    others.sendall(b"x")
    assert others.recv(1) == b"x"
    second.close()


@ROUTES
def test_one_that_died_is_made_anew_by_who_needs_it(site: Site, route_type: RouteType) -> None:
    first, second = route_type(site.record(job_id="7")), route_type(site.record(job_id="8"))
    stream = first.open()
    os.kill(int(site.started[0].split()[0]), signal.SIGKILL)
    with pytest.raises(ConnectionResetError, match="the bridge is gone"):
        stream.recv(1)
    exchange(second)
    assert len(site.started) == 2
    if route_type is SrunRoute:
        assert "--jobid=7" in site.started[0]
        assert "--jobid=8" in site.started[1]
    first.close()
    second.close()


@ROUTES
def test_a_socket_that_is_not_seen_from_there_is_passed_over_for_the_port(site: Site, route_type: RouteType) -> None:
    route = route_type(site.record(socket="/nowhere/socket"))
    exchange(route)
    exchange(route)
    route.close()
    nobody = route_type(site.record(socket="/nowhere/socket", port=1))
    with pytest.raises(TunnelError) as error:
        nobody.open()
    assert "Nobody listens at the door's address on n02" in str(error.value)
    assert "unix:/nowhere/socket: No such file or directory; tcp:1: Connection refused" in error.value.evidence
    nobody.close()


@ROUTES
def test_what_it_printed_is_the_evidence(site: Site, route_type: RouteType) -> None:
    site.let(before=r"printf 'error: \033[1mInvalid job id\n' >&2; exit 1")
    route = route_type(site.record())
    with pytest.raises(TunnelError) as error:
        route.open()
    assert "The bridge did not start on n02" in error.value.what
    assert "Welcome to n02" in error.value.evidence
    assert "error:  [1mInvalid job id" in error.value.evidence
    assert "\x1b" not in str(error.value)
    assert f"{route_type.name.partition('-')[0]} " in error.value.remedy
    site.let()
    exchange(route)
    route.close()


@ROUTES
def test_an_interpreter_without_the_package_is_told_in_its_own_words(site: Site, route_type: RouteType) -> None:
    route = route_type(site.record(package="/nowhere"))
    with pytest.raises(TunnelError, match="No module named 'hpc_workspace'"):
        route.open()
    route.close()


@ROUTES
def test_a_record_without_an_interpreter_is_an_earlier_versions(site: Site, route_type: RouteType) -> None:
    with pytest.raises(TunnelError, match="earlier version"):
        route_type(site.record(python=""))


@ROUTES
def test_without_the_program_there_is_no_such_route(
    site: Site, route_type: RouteType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TunnelError, match="on PATH"):
        route_type(site.record())


def test_srun_needs_a_job_and_hears_nothing_of_a_surrounding_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TunnelError, match="no Slurm job"):
        SrunRoute(site.record(job_id=None))
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    route = SrunRoute(site.record())
    exchange(route)
    assert "a surrounding job" not in site.started
    route.close()


def test_what_is_asked_of_srun_and_ssh() -> None:
    assert build_srun_argv("7", "n02", ["/v/python", "-V"])[-2:] == ["/v/python", "-V"]
    assert build_ssh_argv("-oProxyCommand=x", ["/v/py thon", "$(x)"])[-3:] == [
        "--",
        "-oProxyCommand=x",
        "'/v/py thon' '$(x)'",
    ]


_CLIENT = """
import os, signal, sys
sys.path[:0] = {path!r}
from hpc_workspace.connect.multiplexed import SshCommandRoute
from hpc_workspace.record import Record
route = SshCommandRoute(Record.model_validate_json({record!r}))
stream = route.open()
{then}
"""


def _client(site: Site, then: str) -> subprocess.Popen[str]:
    code = _CLIENT.format(path=sys.path, record=site.record().model_dump_json(), then=then)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_it_ends_with_a_client_that_is_killed_even_if_a_forked_child_lives_on(site: Site) -> None:
    client = _client(site, "if os.fork() == 0: sys.stdin.read(); os._exit(0)\nprint('up', flush=True)\nsignal.pause()")
    assert client.stdin is not None
    assert client.stdout is not None
    assert client.stdout.readline() == "up\n"
    client.kill()
    wait_gone(int(site.started[0].split()[0]))
    client.stdin.close()
    client.wait()
    client.stdout.close()


def test_a_forked_child_gets_one_of_its_own(site: Site) -> None:
    client = _client(
        site,
        "child = os.fork()\n"
        "route.open().close()\n"
        "print('up', flush=True)\n"
        "if child: os.waitpid(child, 0); route.open().close(); print('still', flush=True)\n"
        "os._exit(0)",
    )
    out, _ = client.communicate(timeout=20)
    assert out == "up\nup\nstill\n"
    assert len(site.started) == 2
