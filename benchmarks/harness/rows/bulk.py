"""Large files: through SSH beside `scp`, through the shared file system beside `cp`, and beside OpenHands' client.

Each copy is removed when it has been timed, so that what the kernel has not yet written to the disk of one contestant
is not written during the next one's time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness.floors import kernel_copy, spawned_s, tcp_socket, timed_s
from benchmarks.harness.places import JOB_NODE, Places
from benchmarks.harness.values import Contestant, Goal, Measure, Row
from benchmarks.harness.worker_process import WorkerError
from hpc_workspace import Workspace

MIB = 256
_ROUNDS = 7
_UPSTREAM_ROUNDS = 3
_INSIDE = "/tmp/hw-bench"  # noqa: S108 - inside the container
_SCP = "`scp`"
_CP = "`cp`"
_UPSTREAM = "upstream's client on its server"


@contextlib.contextmanager
def _removed(path: Path) -> Iterator[str]:
    """A path at which there is nothing, before and after."""
    path.unlink(missing_ok=True)
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def _speed(act: Callable[[], object]) -> float:
    return MIB / timed_s(act)


def upload_speed(workspace: Workspace, source: Path, destination: str) -> float:
    """MiB/s into a workspace; the copy is removed."""
    try:
        return _speed(lambda: workspace.file_upload(source, destination))
    finally:
        workspace.execute_command(f"rm -f {destination}")


def _up_by(route: str) -> Measure:
    return lambda places: upload_speed(places.by_route(route), places.file(MIB), f"{_INSIDE}-up")


def _down_by(route: str) -> Measure:
    def measure(places: Places) -> float:
        source = _file_inside(places)
        with _removed(places.directory / "down") as target:
            return _speed(lambda: places.by_route(route).file_download(source, target))

    return measure


def _file_inside(places: Places) -> str:
    """A file in the job's container, on its node's own disk."""
    path = f"{_INSIDE}-{MIB}MiB"
    if places.by_route("paramiko").execute_command(f"test -e {path}").exit_code:
        places.by_route("paramiko").file_upload(places.file(MIB), path)
    return path


def _scp_up(places: Places) -> float:
    target = f"{places.node_directory}/scp"
    worker, source = places.on_node, places.file(MIB)
    try:
        return MIB / spawned_s(["scp", "-B", "-q", str(source), f"{JOB_NODE}:{target}"])
    finally:
        worker.ask("remove", path=target)


def _file_on_node(places: Places) -> str:
    path = f"{places.node_directory}/{MIB}MiB"
    places.on_node.ask("make_file", path=path, mib=MIB)
    return path


def _scp_down(places: Places) -> float:
    source = _file_on_node(places)
    with _removed(places.directory / "down") as target:
        return MIB / spawned_s(["scp", "-B", "-q", f"{JOB_NODE}:{source}", target])


def _tcp_up(places: Places) -> float:
    """Plain TCP to a process on the node that writes what comes to a file."""
    worker, path = places.on_node, f"{places.node_directory}/tcp"
    told = worker.ask("listen", address=JOB_NODE)
    worker.tell("receive", path=path)

    def act() -> None:
        with tcp_socket(JOB_NODE, told["port"]) as connection, places.file(MIB).open("rb") as source:
            connection.sendall(bytes.fromhex(told["nonce"]))
            connection.sendfile(source)
            connection.shutdown(1)
            if connection.recv(1) != b".":
                raise WorkerError("not all of it came through")

    try:
        return _speed(act)
    finally:
        worker.answer()
        worker.ask("remove", path=path)


def _tcp_down(places: Places) -> float:
    worker, source = places.on_node, _file_on_node(places)
    told = worker.ask("listen", address=JOB_NODE)
    worker.tell("send", path=source)
    buffer = memoryview(bytearray(1024 * 1024))
    with _removed(places.directory / "down") as target:

        def act() -> None:
            with tcp_socket(JOB_NODE, told["port"]) as connection, open(target, "wb", buffering=0) as file:
                connection.sendall(bytes.fromhex(told["nonce"]))
                while count := connection.recv_into(buffer):
                    file.write(buffer[:count])

        try:
            return _speed(act)
        finally:
            worker.answer()


def _by_ssh(direction: str, route: str) -> Row:
    is_up = direction == "up"
    return Row(
        name=f"ssh-{direction}-{route}",
        what=f"{MIB} MiB {direction}, login node to a job, by {route}",
        unit="MiB/s",
        node="login",
        contestants=(
            Contestant(route, "ours", _up_by(route) if is_up else _down_by(route)),
            Contestant("plain TCP, in Python", "floor", _tcp_up if is_up else _tcp_down),
            Contestant(_SCP, "peer", _scp_up if is_up else _scp_down),
        ),
        goals=(Goal("ratio", 0.9, _SCP),),
        rounds=_ROUNDS,
    )


def _shared_up(act: Callable[[Places, str, str], object]) -> Measure:
    def measure(places: Places) -> float:
        workspace, source = places.by_route("paramiko"), str(places.file(MIB))
        with _removed(Path(record_mount(workspace), "up")) as target:
            return _speed(lambda: act(places, source, target))

    return measure


def _shared_down(act: Callable[[Places, str, str], object]) -> Measure:
    def measure(places: Places) -> float:
        source = places.shared_directory / f"{MIB}MiB"
        if not source.exists():
            kernel_copy(str(places.file(MIB)), str(source))
            os.sync()
        # On the disk that a job's results are looked at from; the same for all.
        with _removed(places.directory / "down") as target:
            return _speed(lambda: act(places, str(source), target))

    return measure


def record_mount(workspace: Workspace) -> str:
    """The directory here that is /workspace there."""
    mount = workspace._require_record().mount_dir
    assert mount is not None
    return mount


def _as_inside(path: str) -> str:
    return f"/workspace/{Path(path).name}"


def _cp(_: Places, source: str, target: str) -> None:
    spawned_s(["cp", source, target])


def _kernel(_: Places, source: str, target: str) -> None:
    kernel_copy(source, target)


def _shared(direction: str, ours: Callable[[Places, str, str], object]) -> Row:
    way = _shared_up if direction == "up" else _shared_down
    return Row(
        name=f"shared-{direction}",
        what=f"{MIB} MiB {direction}, through a `mount_dir` on the shared file system",
        unit="MiB/s",
        node="login",
        contestants=(
            Contestant("mount_dir", "ours", way(ours)),
            Contestant("copy_file_range", "floor", way(_kernel)),
            Contestant(_CP, "peer", way(_cp)),
        ),
        goals=(Goal("ratio", 0.9, _CP),),
        rounds=15,
    )


def _upstream_upload_s(places: Places) -> float:
    try:
        answer = places.upstream.ask("upload", source=str(places.file(MIB)), destination=f"{_INSIDE}-upstream")
        return float(answer["took_s"])
    finally:
        places.openhands.execute_command(f"rm -f {_INSIDE}-upstream")


ROWS: tuple[Row, ...] = (
    *(_by_ssh(direction, route) for route in ("paramiko", "openssh") for direction in ("up", "down")),
    _shared("up", lambda places, source, target: places.by_route("paramiko").file_upload(source, _as_inside(target))),
    _shared(
        "down", lambda places, source, target: places.by_route("paramiko").file_download(_as_inside(source), target)
    ),
    Row(
        name="upload-openhands",
        what=f"{MIB} MiB up, OpenHands' server on this node",
        unit="s",
        node="n01",
        contestants=(
            Contestant(
                "OpenHands' server",
                "ours",
                lambda places: MIB / upload_speed(places.openhands, places.file(MIB), f"{_INSIDE}-up"),
            ),
            Contestant("copy_file_range", "floor", lambda places: _local_copy_s(places)),
            Contestant(_UPSTREAM, "peer", _upstream_upload_s),
            Contestant(
                "our client, bundled server",
                "peer",
                lambda places: MIB / upload_speed(places.bundled, places.file(MIB), f"{_INSIDE}-up"),
            ),
        ),
        goals=(Goal("ratio", 1.0, _UPSTREAM),),
        rounds=_UPSTREAM_ROUNDS,
    ),
)


def _local_copy_s(places: Places) -> float:
    source = str(places.file(MIB))
    with _removed(places.directory / "copy") as target:
        return timed_s(lambda: kernel_copy(source, target))
