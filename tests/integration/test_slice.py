"""The main job, as an ordinary user on the real cluster: real sbatch, real apptainer, real sshd."""

from __future__ import annotations

import json
import re
import signal

import pytest

from tests.integration.cluster import COMPUTE, NODES, VENV, Cluster

pytestmark = pytest.mark.cluster

TINY, SERVER = "/shared/images/tiny.sif", "/shared/images/agent-server.sif"
LIST_WORKSPACES = "mkdir -p ~/.hpc_workspace/workspaces; ls -A ~/.hpc_workspace/workspaces"
RUN = [f"{VENV}/hpc-workspace", "run", "--slurm", "-p", "cpu", "-t", "5"]

HOLD = """
import json, sys
from hpc_workspace import ApptainerWorkspace, SlurmOptions
options = json.loads(sys.argv[1])
if "slurm" in options:
    options["slurm"] = SlurmOptions(**options["slurm"])
with ApptainerWorkspace(**options) as w:
    print(json.dumps({"id": w.id, "key": w.api_key, "node": w.node, "port": w._record.port, "job": w.job}), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("image", [["--image", TINY], ["--image", "/shared/images/busybox.sif"], ["--sif", SERVER]])
def test_run_prints_a_compute_nodes_name_exits_with_the_commands_code_and_leaves_nothing(
    cluster: Cluster, image: list[str]
) -> None:
    before = cluster.run("login", ["sh", "-c", LIST_WORKSPACES]).stdout
    ended = cluster.run("login", [*RUN, "--mem", "2G", *image, "--", "hostname; id -un; exit 3"])
    assert ended.returncode == 3, ended.stderr
    node, user = ended.stdout.split()
    assert node in COMPUTE
    assert user == "root"  # --fakeroot: root inside, the tester outside
    assert cluster.leftovers() == {}
    assert cluster.run("login", ["sh", "-c", LIST_WORKSPACES]).stdout == before


def test_several_arguments_are_one_program_with_its_arguments(cluster: Cluster) -> None:
    ended = cluster.run("n01", [f"{VENV}/hpc-workspace", "run", "--image", TINY, "--", "printf", "%s|", "a b", "c'd"])
    assert ended.stdout == "a b|c'd|"


def test_the_key_is_nowhere_but_in_files_that_are_shut_to_others(cluster: Cluster) -> None:
    options = {"image": TINY, "slurm": {"partition": "cpu", "time": "00:05:00", "mem": "1G"}}
    client = cluster.open("login", [f"{VENV}/python", "-c", HOLD, json.dumps(options)])
    assert client.stdin and client.stdout
    told = json.loads(client.stdout.readline())
    folder = f"/home/tester/.hpc_workspace/workspaces/{told['id']}"
    for node in NODES:
        assert told["key"] not in cluster.run(node, ["ps", "-eo", "args"], user="root").stdout
    job_environment = cluster.run(told["node"], ["sh", "-c", "cat /proc/[0-9]*/environ"], user="root").stdout
    assert told["key"] not in job_environment
    holding = cluster.run("login", ["grep", "-rlF", told["key"], folder]).stdout.split()
    assert holding == [f"{folder}/token"]
    modes = cluster.run("login", ["find", folder, "-printf", "%y %m\n"]).stdout.split("\n")
    assert set(filter(None, modes)) == {"d 700", "f 600"}
    scratch = cluster.run(told["node"], ["sh", "-c", "find /tmp/hpcws-* -maxdepth 0 -printf '%m'"]).stdout
    assert scratch == "700"
    client.communicate("\n", timeout=60)
    assert client.returncode == 0
    assert cluster.leftovers() == {}


def test_a_stranger_gets_no_file_and_nothing_but_a_nonce_from_the_door(cluster: Cluster) -> None:
    options = {"image": TINY, "slurm": {"partition": "cpu", "time": "00:05:00", "mem": "1G"}}
    client = cluster.open("login", [f"{VENV}/python", "-c", HOLD, json.dumps(options)])
    assert client.stdin and client.stdout
    told = json.loads(client.stdout.readline())
    look = cluster.run("login", ["cat", f"/home/tester/.hpc_workspace/workspaces/{told['id']}/token"], user="stranger")
    assert look.returncode != 0
    knock = (
        "import socket,sys; s=socket.create_connection(('127.0.0.1',int(sys.argv[1]))); s.sendall(b'HWDOOR1\\n'+bytes(32));"
        'a=s.recv(4096); s.sendall(bytes(32)+b\'\\0\\x11{"want":"server"}\'); b=s.recv(4096); print(len(a), len(b))'
    )
    answer = cluster.run(told["node"], ["python3", "-c", knock, str(told["port"])], user="stranger")
    assert answer.stdout.split() == ["72", "0"], answer.stderr
    web = "import socket,sys; s=socket.create_connection(('127.0.0.1',int(sys.argv[1])));"
    web += "s.sendall(b'GET /health HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'+bytes(64)); print(len(s.recv(4096)))"
    assert cluster.run(told["node"], ["python3", "-c", web, str(told["port"])], user="stranger").stdout.strip() in (
        "0",
        "",
    )
    client.communicate("\n", timeout=60)
    assert client.returncode == 0


def test_a_job_that_ends_before_publishing_is_an_error_with_job_state_node_and_log(cluster: Cluster) -> None:
    ended = cluster.run("login", [*RUN, "--image", TINY, "--setup", "echo no such module >&2; exit 7", "--", "true"])
    assert ended.returncode == 255
    assert re.search(r"Slurm job \d+ on n0\d failed \(FAILED\) before the workspace was ready", ended.stderr)
    assert "no such module" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_interpreter_that_is_not_on_the_node_is_named(cluster: Cluster) -> None:
    ended = cluster.run("login", [*RUN, "--image", TINY, "--python", "/nowhere/python", "--", "true"])
    assert ended.returncode == 255
    assert "/nowhere/python can't run hpc_workspace" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--slurm", "-p", "nosuch", "--image", TINY], "invalid partition specified: nosuch"),
        (["--slurm", "-t", "soon", "--image", TINY], "time is not a time as sbatch takes it"),
        (["--sif", "/shared/images/nosuch.sif"], "SIF file not found: /shared/images/nosuch.sif"),
        (["--sif", "/etc/passwd"], "/etc/passwd is not a SIF file"),
        ([], "give exactly one of server_image, sif_file and image"),
        (["-p", "cpu", "--image", TINY], "without --slurm"),
    ],
)
def test_a_mistake_is_one_screen_that_names_it(cluster: Cluster, arguments: list[str], expected: str) -> None:
    ended = cluster.run("login", [f"{VENV}/hpc-workspace", "run", *arguments, "--", "true"])
    assert ended.returncode == 255
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) < 24


def test_a_local_workspace_ends_with_its_killed_client(cluster: Cluster) -> None:
    client = cluster.open("n02", [f"{VENV}/python", "-c", HOLD, json.dumps({"image": TINY})])
    assert client.stdout
    told = json.loads(client.stdout.readline())
    assert told["node"] == "n02"
    cluster.run("n02", ["pkill", "-KILL", "-u", "tester", "-f", "sys.stdin.readline"], user="root")
    client.wait(timeout=30)
    assert client.returncode == 128 + signal.SIGKILL
    assert cluster.leftovers() == {}


def test_a_detached_workspace_is_found_used_and_ended_by_its_id(cluster: Cluster) -> None:
    cli = f"{VENV}/hpc-workspace"
    up = cluster.run("login", [cli, "up", "--slurm", "-p", "cpu", "-t", "5", "--image", TINY])
    name = up.stdout.strip()
    try:
        listed = json.loads(cluster.run("login", [cli, "ps", "--json"]).stdout)
        ended = cluster.run("login", [cli, "exec", name, "--", "echo hello; exit 5"])
    finally:
        down = cluster.run("login", [cli, "down", name])
    # Others may be listed too: the records of node programs that other tests killed.
    assert name in [record["workspace_id"] for record in listed]
    assert (ended.stdout, ended.returncode) == ("hello\n", 5)
    assert down.returncode == 0, down.stderr
    assert cluster.leftovers() == {}
    gone = cluster.run("login", [cli, "exec", name, "--", "true"])
    assert f"There is no workspace '{name}'" in gone.stderr


def test_demo_runs_in_a_container_as_an_ordinary_user(cluster: Cluster) -> None:
    ended = cluster.run("n03", [f"{VENV}/hpc-workspace", "demo", "--image", TINY])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "a container of apptainer" in ended.stdout
    assert "process" not in ended.stdout.splitlines()[0]


@pytest.mark.long
def test_demo_runs_with_the_agent_servers_own_image(cluster: Cluster) -> None:
    ended = cluster.run("n03", [f"{VENV}/hpc-workspace", "demo", "--sif", SERVER])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "a container of apptainer" in ended.stdout


@pytest.mark.parametrize(
    ("connect", "said"),
    [("paramiko", "SSH to tester@n0"), ("openssh", "Permission denied (publickey)")],
)
def test_without_a_key_ssh_says_why_and_the_job_is_ended(cluster: Cluster, connect: str, said: str) -> None:
    """Asked for by name: by itself another way is taken (test_sites.py)."""
    command = f"HPC_WORKSPACE_WORKSPACE_CONNECT={connect} {' '.join([*RUN, '--image', TINY, '--', 'true'])}"
    script = f"mv ~/.ssh/id_ed25519 ~/.ssh/off; {command}; code=$?; mv ~/.ssh/off ~/.ssh/id_ed25519; exit $code"
    ended = cluster.run("login", ["sh", "-c", script])
    assert ended.returncode == 255
    assert said in ended.stderr
    assert cluster.leftovers() == {}


SERVER_KILLED = """
import subprocess
from hpc_workspace import ApptainerWorkspace, SlurmOptions, WorkspaceError
w = ApptainerWorkspace(image="/shared/images/tiny.sif", slurm=SlurmOptions(partition="cpu", time="5", mem="1G")).start()
subprocess.run(["ssh", w.node, "pkill -9 -f serve.py"])
try:
    w.execute_command("true")
except WorkspaceError as error:
    print(type(error).__name__)
w.close()
"""


def test_a_killed_server_is_a_typed_error_and_leaves_nothing(cluster: Cluster) -> None:
    ended = cluster.python("login", SERVER_KILLED)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "ContainerError"  # which says what the server printed last
    assert cluster.leftovers() == {}
