"""What a client's resident memory grows by while a large file passes through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness.places import Places
from benchmarks.harness.values import Contestant, Goal, Measure, Node, Row
from benchmarks.harness.worker_process import WorkerProcess
from hpc_workspace import Workspace

_MIB = 2048
_UPSTREAM_MIB = 256
_INSIDE = "/tmp/hw-bench-memory"  # noqa: S108 - inside the container
_EXTRA_MIB = 32.0
_ROUNDS = 2

Client = Callable[[Places], tuple[WorkerProcess, Workspace]]


def _extra_mib(answer: dict[str, Any]) -> float:
    return float(answer["extra_bytes"]) / 1024**2


def _here(places: Places) -> tuple[WorkerProcess, Workspace]:
    return places.client_beside("the bundled server", lambda: places.bundled, "auto"), places.bundled


def _by_ssh(places: Places) -> tuple[WorkerProcess, Workspace]:
    return places.client_beside("the job", lambda: places.job, "paramiko"), places.by_route("paramiko")


def _up(client: Client) -> Measure:
    def measure(places: Places) -> float:
        worker, workspace = client(places)
        try:
            return _extra_mib(worker.ask("upload", source=str(places.file(_MIB)), destination=f"{_INSIDE}-up"))
        finally:
            workspace.execute_command(f"rm -f {_INSIDE}-up")

    return measure


def _down(client: Client) -> Measure:
    def measure(places: Places) -> float:
        worker, workspace = client(places)
        source, target = f"{_INSIDE}-down", places.directory / "memory-down"
        if workspace.execute_command(f"test -e {source}").exit_code:
            workspace.file_upload(places.file(_MIB), source)
        try:
            return _extra_mib(worker.ask("download", source=source, destination=str(target)))
        finally:
            target.unlink(missing_ok=True)

    return measure


def _read(places: Places) -> float:
    return _extra_mib(places.beside.ask("read", source=str(places.file(_MIB))))


def _upstream(places: Places) -> float:
    source = str(places.file(_UPSTREAM_MIB))
    try:
        return _extra_mib(places.upstream.ask("upload", source=source, destination=f"{_INSIDE}-upstream"))
    finally:
        places.openhands.execute_command(f"rm -f {_INSIDE}-upstream")


def _row(name: str, what: str, node: Node, ours: Measure, peers: tuple[Contestant, ...] = ()) -> Row:
    return Row(
        name=name,
        what=f"client memory beyond what it had, {_MIB // 1024} GiB {what}",
        unit="MiB",
        node=node,
        contestants=(
            Contestant("our client", "ours", ours),
            Contestant("the file read in 1 MiB pieces", "floor", _read),
            *peers,
        ),
        goals=(Goal("figure", _EXTRA_MIB),),
        rounds=_ROUNDS,
    )


ROWS: tuple[Row, ...] = (
    _row(
        "memory-up",
        "up, on this node",
        "n01",
        _up(_here),
        (Contestant(f"upstream's client, {_UPSTREAM_MIB} MiB up", "peer", _upstream),),
    ),
    _row("memory-down", "down, on this node", "n01", _down(_here)),
    _row("memory-up-ssh", "up, login node to a job, by paramiko", "login", _up(_by_ssh)),
    _row("memory-down-ssh", "down, login node to a job, by paramiko", "login", _down(_by_ssh)),
)
