"""Every option of the container, against real Apptainer, as an ordinary user on a node without Slurm in between."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from tests.integration.cluster import SERVER, TINY, VENV, Cluster

pytestmark = pytest.mark.cluster

NODE = "n01"


def run_in(cluster: Cluster, options: str, *commands: str, **more: Any) -> list[dict[str, Any]]:
    """The results of `commands` in a workspace with `options` (Python keyword arguments)."""
    code = f"""
with ApptainerWorkspace(**dict(image=TINY) | dict({options})) as w:
    tell(results=[w.execute_command(c, timeout=100).model_dump() for c in {list(commands)!r}], notices=w.notices)
"""
    told = cluster.tell(NODE, code, **more)
    return [*told["results"], {"notices": told["notices"], "stderr": told["stderr"]}]


@pytest.mark.parametrize("place", ["/", "/tmp", "/workspace"])
def test_a_file_of_2_gib_can_be_written(cluster: Cluster, place: str) -> None:
    command = f"head -c 2147483648 /dev/zero > {place}/big && stat -c %s {place}/big && rm {place}/big"
    result, _ = run_in(cluster, "", command)
    assert result["stdout"] == "2147483648\n", result["stderr"]


def test_home_cwd_tmp_and_bind_paths_of_the_host_are_not_visible(cluster: Cluster) -> None:
    before = (
        "Path('/tmp/of-the-host').touch(); os.makedirs(Path.home() / 'cwd', exist_ok=True); "
        "os.chdir(Path.home() / 'cwd'); Path('here').touch()\n"
    )
    look = (
        "ls -A /tmp ~ /shared /home 2>&1; find / -xdev -name here -o -xdev -name of-the-host; mount | grep -c /shared"
    )
    code = f"""{before}
for compat in (True, False):
    with ApptainerWorkspace(image=TINY, enable_docker_compat=compat) as w:
        tell(**{{"compat" if compat else "plain": w.execute_command({look!r}).stdout}})
Path('/tmp/of-the-host').unlink()
"""
    told = cluster.tell(NODE, code)
    for seen in (told["compat"], told["plain"]):
        assert "of-the-host" not in seen
        assert "here\n" not in seen
        assert ".hpc_workspace" not in seen
        assert "images" not in seen


def test_names_can_be_resolved_as_on_the_node(cluster: Cluster) -> None:
    result, _ = run_in(cluster, "", "cat /etc/hosts; ls /etc/resolv.conf")
    assert result["stdout"] == cluster.run(NODE, ["cat", "/etc/hosts"]).stdout + "/etc/resolv.conf\n"


def test_the_environment_is_clean_save_what_is_forwarded(cluster: Cluster) -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "k1", "SLURM_JOB_ID": "7", "PMIX_RANK": "0", "PMI_FD": "3", "OPENAI_API_KEY": "k2",
        "APPTAINERENV_SMUGGLED": "k3", "PYTHONSTARTUP": "/x", "WANTED": "a,b\nc=d",
    }  # fmt: skip
    look = ["env -0 | base64 -w0", "tr '\\0' '\\n' </proc/1/environ"]
    commands, first, _ = run_in(cluster, "forward_env=['WANTED', 'MISSING']", *look, env=secrets)
    pairs = base64.b64decode(commands["stdout"]).decode().split("\0")
    found = dict(pair.split("=", 1) for pair in pairs if pair)
    assert found["WANTED"] == "a,b\nc=d"
    assert not set(found) & (set(secrets) - {"WANTED"})
    assert "SMUGGLED" not in found
    assert "k1" not in first["stdout"]


@pytest.mark.parametrize("fakeroot", [True, False])
@pytest.mark.parametrize("place", ["/workspace/below", "/tmp/below", "/opt/new/dir", "/usr/lib", "/bin/sub"])
def test_the_working_dir_is_made_and_writable_and_hides_nothing(cluster: Cluster, place: str, fakeroot: bool) -> None:
    result, _ = run_in(
        cluster,
        f"working_dir={place!r}, use_fakeroot={fakeroot}",
        "pwd -P; touch it && rm it; ls -d /usr/lib/* | wc -l",
    )
    here, count = result["stdout"].split()
    assert here == place.replace("/bin/", "/usr/bin/")
    assert int(count) > 3
    assert result["stderr"] == ""


@pytest.mark.parametrize("writable", ["tmpfs", "none"])
def test_without_an_overlay_the_working_dir_is_writable_all_the_same(cluster: Cluster, writable: str) -> None:
    result, _ = run_in(cluster, f"working_dir='/data/x', writable={writable!r}", "pwd; touch it && echo made")
    assert result["stdout"] == "/data/x\nmade\n"


def test_a_tmpfs_says_how_large_it_really_is(cluster: Cluster) -> None:
    result, more = run_in(cluster, "writable='tmpfs'", "df -m / | awk 'NR==2 {print $2}'")
    said = re.search(r"at most (\d+) MiB", more["notices"][0])
    assert said is not None
    assert abs(int(said[1]) - int(result["stdout"])) <= 1  # df rounds up
    assert "at most" in more["stderr"]


def test_nothing_can_be_written_with_writable_none(cluster: Cluster) -> None:
    result, _ = run_in(cluster, "writable='none'", "touch /usr/x")
    assert "Read-only file system" in result["stderr"]


def test_binds_of_the_option_and_of_the_environment_are_mounted(cluster: Cluster) -> None:
    cluster.run(
        NODE, ["sh", "-c", "mkdir -p /tmp/bound,a /tmp/bound2; echo one > /tmp/bound2/f; echo two > /tmp/bound2/g"]
    )
    options = "extra_bind_mounts=['/tmp/bound2:/data:ro', '/tmp/bound2/g']"
    result, _ = run_in(
        cluster,
        options,
        "cat /data/f /tmp/bound2/g /env/f; touch /data/new",
        env={"OPENHANDS_APPTAINER_EXTRA_BINDS": " /tmp/bound2:/env , "},
    )
    cluster.run(NODE, ["rm", "-r", "/tmp/bound,a", "/tmp/bound2"])
    assert result["stdout"] == "one\ntwo\none\n"
    assert "Read-only file system" in result["stderr"]


@pytest.mark.parametrize("name", ["plain", "a:b,c d"])
def test_mount_dir_is_seen_at_workspace_and_written_by_its_owner(cluster: Cluster, name: str) -> None:
    code = f"""
folder = Path.home() / {name!r}
folder.mkdir(exist_ok=True)
with ApptainerWorkspace(image=TINY, mount_dir=str(folder)) as w:
    w.execute_command("echo hello > f")
found = folder / "f"
tell(text=found.read_text(), uid=found.stat().st_uid == os.getuid())
found.unlink(); folder.rmdir()
"""
    assert cluster.tell(NODE, code) | {"stderr": ""} == {"text": "hello\n", "uid": True, "stderr": ""}


def test_enable_gpu_starts_on_a_node_without_one(cluster: Cluster) -> None:
    result, _ = run_in(cluster, "enable_gpu=True", "echo $CUDA_VISIBLE_DEVICES", env={"CUDA_VISIBLE_DEVICES": "3"})
    assert result["stdout"] == "3\n"


EXTRA_PORTS = """
import urllib.request
with ApptainerWorkspace({options}, extra_ports=True, host_port=18010) as w:
    vscode, vnc = w.extra_ports["vscode"], w.extra_ports["vnc"]
    port = w._record.extra_ports["vscode"]
    w.execute_command(f"cd /tmp && echo it > f && (python3 -m http.server {{port}} >/dev/null 2>&1 &) && "
        f"until python3 -c 'import socket; socket.create_connection((\\"127.0.0.1\\", {{port}}))' 2>/dev/null; do :; done")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))
    try:
        opener.open(vnc.url, timeout=10).read()
        refused = False
    except OSError:
        refused = True
    tell(ports=[vscode.port, vnc.port], text=opener.open(vscode.url + "/f", timeout=10).read().decode(), refused=refused)
"""


@pytest.mark.parametrize("options", ["image=TINY", "sif_file=SERVER"])
def test_extra_ports_are_the_two_after_host_port(cluster: Cluster, options: str) -> None:
    told = cluster.tell(NODE, EXTRA_PORTS.format(options=options))
    assert told["ports"] == [18011, 18012]
    assert told["text"] == "it\n"
    assert told["refused"] is True


@pytest.mark.parametrize("taken", [18020, 18021])
def test_a_taken_port_says_so_before_anything_starts(cluster: Cluster, taken: int) -> None:
    code = f"""
import socket
held = socket.create_server(("127.0.0.1", {taken}))
w = ApptainerWorkspace(image=TINY, host_port=18020, extra_ports=True)
before = set(os.listdir(Path.home() / ".hpc_workspace/workspaces"))
tell(error=error_of(w.start), made=sorted(set(os.listdir(Path.home() / ".hpc_workspace/workspaces")) - before))
"""
    told = cluster.tell(NODE, code)
    assert told["error"]["kind"] == "PrerequisiteError"
    assert f"Port {taken} is not available" in told["error"]["text"]
    assert told["made"] == []


MISTAKES = [
    ("sif_file='/shared/images/nosuch.sif'", "ImageError", "SIF file not found: /shared/images/nosuch.sif"),
    ("sif_file='/etc/passwd'", "ImageError", "/etc/passwd is not a SIF file"),
    ("image=TINY, mount_dir='/no/such'", "ConfigError", "mount_dir /no/such is not a directory"),
    ("image=TINY, extra_bind_mounts=['/no/such:/x']", "ConfigError", "extra_bind_mounts: /no/such does not exist"),
    ("image=TINY, encryption_pem='/no/such'", "ConfigError", "encryption_pem /no/such is not a file"),
    ("image=TINY, sif_file=TINY", "ConfigError", "give exactly one of"),
    ("image=TINY, max_processes=3", "ConfigError", "max_processes"),
    ("runtime='process', max_processes=100", "ConfigError", "leave out max_processes"),
    ("server_image='login:5000/nosuch:latest'", "ImageError", "Failed to pull and convert Docker image"),
]


@pytest.mark.parametrize(("options", "kind", "said"), MISTAKES)
def test_a_mistake_is_a_typed_error_with_nothing_started(cluster: Cluster, options: str, kind: str, said: str) -> None:
    code = f"""
home = Path.home() / ".hpc_workspace/workspaces"
before = set(os.listdir(home))
tell(error=error_of(lambda: ApptainerWorkspace({options}).start()), made=sorted(set(os.listdir(home)) - before))
"""
    told = cluster.tell(NODE, code)
    assert told["error"]["kind"] == kind
    assert said in told["error"]["text"]
    assert told["made"] == []


def test_the_openhands_server_takes_the_same_options(cluster: Cluster) -> None:
    code = """
Path("/tmp/mounted").mkdir(exist_ok=True)
with ApptainerWorkspace(sif_file=SERVER, mount_dir="/tmp/mounted", working_dir="/opt/w", forward_env=["WANTED"],
                        use_fakeroot=False, max_processes=400) as w:
    tell(out=w.execute_command("pwd; id -u; echo $WANTED; ulimit -u; touch it /workspace/it && ls /workspace").stdout,
         uid=os.getuid())
Path("/tmp/mounted/it").unlink(); Path("/tmp/mounted").rmdir()
"""
    told = cluster.tell(NODE, code, env={"WANTED": "x,y"})
    assert told["out"].split() == ["/opt/w", str(told["uid"]), "x,y", "400", "it"]


def test_the_command_line_names_a_missing_apptainer(cluster: Cluster) -> None:
    command = f"PATH=/nowhere {VENV}/hpc-workspace run --image {TINY} -- true"
    ended = cluster.run(NODE, ["/bin/sh", "-c", command])
    assert ended.returncode == 255
    assert "Apptainer is not available" in ended.stderr
    assert SERVER not in ended.stderr


def test_singularity_is_run_by_its_own_name(cluster: Cluster) -> None:
    """Debian's Apptainer brings that name along for itself."""
    result, more = run_in(cluster, "runtime='singularity', forward_env=['WANTED']", "echo $WANTED", env={"WANTED": "x"})
    assert result["stdout"] == "x\n"
    assert more["notices"] == []
