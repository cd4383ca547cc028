"""Files where only a real container or a real shared disk will do: a full overlay, mount_dir by each server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.cluster import PRELUDE, SERVER, TINY, TOLD, VENV, Cluster

pytestmark = pytest.mark.cluster

_FULL = """
import errno, tempfile
with tempfile.TemporaryDirectory() as folder, ApptainerWorkspace(**OPTIONS, extra_bind_mounts=[SMALL]) as w:
    source = Path(folder, "source")
    source.write_bytes(b"x" * 30_000_000)
    tree = Path(folder, "tree")
    tree.mkdir()
    os.link(source, tree / "large")
    found = []
    for thing in (source, tree):
        try:
            w.file_upload(thing, f"{SMALL}/new")
        except errors.ServerFileError as error:
            found.append([error.errno == errno.ENOSPC, error.status])
    tell(found=found, left=w.execute_command(f"ls -A {SMALL}").stdout)
"""

_SHARED = """
import tempfile
mount = tempfile.mkdtemp(dir=os.path.expanduser("~"))
with tempfile.TemporaryDirectory() as folder:
    with ApptainerWorkspace(**OPTIONS, mount_dir=mount) as w:
        carried = [0]
        class Counted:
            def __init__(self, stream):
                self.stream = stream
            def recv(self, size):
                data = self.stream.recv(size)
                carried[0] += len(data)
                return data
            def sendall(self, data):
                carried[0] += len(data)
                self.stream.sendall(data)
            def __getattr__(self, name):
                return getattr(self.stream, name)
        link = w._link
        dial = link.dial
        link.dial = lambda *wish: Counted(dial(*wish))
        w.client  # its connections so far are not counted
        w._client._caller.http._transport._pool.close()
        source = Path(folder, "source")
        source.write_bytes(os.urandom(20_000_000))
        source.chmod(0o751)
        w.file_upload(source, "d/new")
        w.file_download("d/new", Path(folder, "back"))
        seen = w.execute_command("stat -c '%a %u %s' d/new; sha256sum < d/new").stdout.split()
        (Path(folder) / "by-http").write_bytes(b"x" * 1000)
        w.file_upload(Path(folder, "by-http"), "small")
        owner = w.execute_command("stat -c %u small").stdout.strip()
        status = Path(folder, "back").stat()
        tell(
            carried=carried[0], seen=seen[:3], owner=owner,
            same=Path(folder, "back").read_bytes() == source.read_bytes(),
            kept=[oct(status.st_mode & 0o777), status.st_mtime_ns == source.stat().st_mtime_ns],
            left=sorted(os.listdir(mount)), outside=os.stat(mount + "/d/new").st_uid == os.getuid(),
        )
import shutil
shutil.rmtree(mount)
"""


def _told(cluster: Cluster, node: str, code: str) -> dict[str, object]:
    import json

    ended = cluster.run(node, [f"{VENV}/python", "-c", PRELUDE + code])
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith(TOLD)]
    found: dict[str, object] = json.loads(lines[-1].removeprefix(TOLD))
    return found


@pytest.fixture
def small(cluster: Cluster) -> Iterator[str]:
    """A disk of 20 MB on n01, everybody's."""
    path = "/mnt/small"
    made = cluster.run(
        "n01", ["sh", "-c", f"mkdir -p {path} && mount -t tmpfs -o size=20m,mode=1777 t {path}"], user="root"
    )
    assert made.returncode == 0, made.stderr
    yield path
    cluster.run("n01", ["sh", "-c", f"umount -l {path} && rmdir {path}"], user="root")


@pytest.mark.parametrize("options", [{"image": TINY}, {"sif_file": SERVER}], ids=["bundled", "openhands"])
def test_a_full_container_is_an_error_and_nothing_of_the_upload_stays(
    cluster: Cluster, small: str, options: dict[str, str]
) -> None:
    told = _told(cluster, "n01", f"OPTIONS, SMALL = {options!r}, {small!r}\n" + _FULL)
    assert told == {"found": [[True, 507], [True, 507]], "left": ""}


WAYS = {
    "bundled-here": ("n01", {"image": TINY}),
    "bundled-slurm": ("login", {"image": TINY, "slurm": "SLURM"}),
    "openhands-slurm": ("login", {"sif_file": SERVER, "slurm": "SLURM"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_bytes_go_by_the_shared_disk_and_come_out_as_by_the_connection(cluster: Cluster, way: str) -> None:
    node, options = WAYS[way]
    code = f"OPTIONS = {options!r}\n".replace("'SLURM'", "SLURM") + _SHARED
    told = _told(cluster, node, code)
    assert told["carried"] < 60_000, told  # type: ignore[operator]
    assert told["seen"] == ["751", told["owner"], "20000000"]
    assert told["same"] is True
    assert told["kept"] == ["0o751", True]
    assert told["left"] == ["d", "small"]
    assert told["outside"] is True
