"""Hostile code inside: the host's files, the neighbour and the node program survive; the rest is an error with a type."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.cluster import Cluster

pytestmark = pytest.mark.cluster

NODE = "n01"
# A victim and its neighbour; what the victim's client sees afterwards, and that everything else is as it was.
SCENE = """
precious = Path.home() / "precious"
precious.write_text("dear")
with ApptainerWorkspace(image=TINY) as neighbour:
    neighbour.write_file("own", "untouched")
    with ApptainerWorkspace({options}) as w:
        {attack}
        program = program_of(w)
        tell(alive=w.alive, program=Path(f"/proc/{{program}}").exists())
    tell(neighbour=neighbour.execute_command("cat own").stdout, precious=precious.read_text(),
         toolbox=neighbour.execute_command("touch /.hw/x").exit_code)
"""


def attack(cluster: Cluster, code: str, options: str = "image=TINY") -> dict[str, object]:
    """What the victim's client tells, after the claims that hold for every attack."""
    told = cluster.tell(NODE, SCENE.format(options=options, attack=code.replace("\n", "\n        ")))
    assert told["neighbour"] == "untouched"
    assert told["precious"] == "dear"
    assert told["toolbox"] != 0
    assert cluster.leftovers([NODE]) == {}
    return told


def test_rm_rf_of_everything_takes_the_images_files_alone(cluster: Cluster) -> None:
    told = attack(
        cluster,
        "w.execute_command('rm -rf /* /.h* 2>/dev/null', timeout=100)\n"
        "tell(error=error_of(lambda: w.execute_command('true')), health='title' in w.health())",
        options="image='/shared/images/busybox.sif'",
    )
    assert told["alive"] is True
    assert told["program"] is True
    assert told["health"] is True
    assert told["error"]["kind"] == "CommandError"  # type: ignore[index]  # there is no shell any more
    assert "could not be started" in told["error"]["text"]  # type: ignore[index]


def test_rm_rf_with_a_mount_dir_takes_what_was_mounted_and_no_more(cluster: Cluster) -> None:
    told = attack(
        cluster,
        "w.execute_command('rm -rf /* 2>/dev/null', timeout=100)\n"
        "tell(mounted=os.listdir('/tmp/given'), parent=sorted(os.listdir('/tmp/giving')))\n",
        options="image='/shared/images/busybox.sif', mount_dir=[os.makedirs('/tmp/giving/deep', exist_ok=True), "
        "os.path.islink('/tmp/given') or os.symlink('/tmp/giving/deep', '/tmp/given'), '/tmp/given'][-1]",
    )
    cluster.run(NODE, ["rm", "-r", "/tmp/giving", "/tmp/given"])
    assert told["mounted"] == []
    assert told["parent"] == ["deep"]


@pytest.mark.parametrize("command", ["kill -9 -1", "kill -9 1", "pkill -9 python; pkill -9 ld.so; kill -TERM -1"])
def test_killing_everything_inside_is_survived_or_an_error_with_a_type(cluster: Cluster, command: str) -> None:
    told = attack(
        cluster,
        f"tell(first=error_of(lambda: w.execute_command({command!r}, timeout=20)))\n"
        "tell(second=error_of(lambda: w.execute_command('true')))",
    )
    for error in (told["first"], told["second"]):
        assert error is None or error["kind"] in ("ContainerError", "CommandError")  # type: ignore[index]
    if told["second"] is None:
        assert told["alive"] is True


def test_a_fork_bomb_stays_in_its_workspace(cluster: Cluster) -> None:
    told = attack(
        cluster,
        "bomb = error_of(lambda: w.execute_command('bomb() { bomb | bomb & }; bomb; wait', timeout=3))\n"
        "tell(bomb=bomb, quick=neighbour.execute_command('echo quick', timeout=60).stdout)",
        options="image=TINY, max_processes=250",
    )
    assert told["quick"] == "quick\n"
    assert told["program"] is True


def test_max_processes_bounds_the_container_and_not_the_user(cluster: Cluster) -> None:
    told = cluster.tell(
        NODE,
        """
outside = [subprocess.Popen(["sleep", "100"]) for _ in range(80)]
with ApptainerWorkspace(image=TINY, max_processes=80) as w:
    tell(few=w.execute_command("for i in 1 2 3 4 5 6 7 8; do sleep 9 & done; jobs | wc -l", timeout=60).stdout,
         many=w.execute_command("for i in $(seq 90); do sleep 9 & done 2>&1; true", timeout=60).stdout)
for process in outside:
    process.kill()
    process.wait()
""",
    )
    assert told["few"] == "8\n"
    assert "Resource temporarily unavailable" in told["many"] or "retry" in told["many"]


@pytest.fixture
def small_disk(cluster: Cluster) -> Iterator[None]:
    """A node whose /tmp has 48 MB."""
    assert (
        cluster.run(NODE, ["mount", "-t", "tmpfs", "-o", "size=48m,mode=1777", "small", "/tmp"], user="root").returncode
        == 0
    )
    yield
    assert cluster.run(NODE, ["umount", "/tmp"], user="root").returncode == 0


@pytest.mark.usefixtures("small_disk")
def test_a_disk_that_a_command_fills_is_the_commands_trouble(cluster: Cluster) -> None:
    told = cluster.tell(
        NODE,
        """
with ApptainerWorkspace(image=TINY) as w:
    full = w.execute_command("head -c 100000000 /dev/zero > /workspace/big", timeout=60)
    after = w.execute_command("echo still here", timeout=60)
    tell(full=full.stderr, after=after.stdout, upload=error_of(lambda: w.write_file("more", b"x" * 1000000)))
    w.execute_command("rm /workspace/big")
    w.write_file("more", b"x" * 1000000)
    tell(size=len(w.read_file("more")))
""",
    )
    assert "No space left on device" in told["full"]
    assert told["after"] == "still here\n"
    assert told["upload"] is not None
    assert told["size"] == 1000000
    assert cluster.leftovers([NODE]) == {}


@pytest.mark.usefixtures("small_disk")
def test_a_start_on_a_full_disk_says_so_and_leaves_nothing(cluster: Cluster) -> None:
    told = cluster.tell(
        NODE,
        """
with open("/tmp/full", "wb") as file:
    try:
        while True:
            file.write(b"x" * 65536)
            file.flush()
    except OSError:
        pass
tell(error=error_of(ApptainerWorkspace(image=TINY).start))
Path("/tmp/full").unlink()
""",
    )
    assert told["error"]["kind"] in ("ContainerError", "ServerNotReadyError")
    assert "o space left on device" in told["error"]["text"]
    assert cluster.leftovers([NODE]) == {}


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("variable", ["TMPDIR", "SLURM_TMPDIR"])
def test_scratch_is_where_there_is_room_and_the_log_says_where(cluster: Cluster, variable: str) -> None:
    place = "/home/tester/roomy place"
    code = """
with ApptainerWorkspace(image=TINY) as w:
    w.execute_command("head -c 100000000 /dev/zero > /big", timeout=60)
    tell(scratch=w._record.node_scratch, log=w._directory.node_log.read_text(), left=os.listdir("/tmp"),
         size=w.execute_command("stat -c %s /big").stdout)
"""
    assert cluster.run(NODE, ["mkdir", "-p", place]).returncode == 0
    told = cluster.tell(NODE, code, env={variable: place})
    assert cluster.run(NODE, ["rmdir", place]).returncode == 0
    assert told["scratch"].startswith(f"{place}/hpcws-")
    assert f"scratch: {told['scratch']}" in told["log"]
    assert f"of {place}, /tmp)" in told["log"]
    assert told["size"] == "100000000\n"
