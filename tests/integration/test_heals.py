"""What breaks between client and workspace is mended: results still arrive, and no command is run twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.cluster import SERVER, Cluster
from tests.integration.test_faults import Client

pytestmark = pytest.mark.cluster

ROUTES = ("paramiko", "openssh")
SLOW = "echo ran >> /workspace/runs; until [ -e /workspace/go ]; do sleep 0.05; done; echo done"
RUN = f"tell(slow=w.execute_command({SLOW!r}, timeout=170).stdout)"
RUNS = "tell(runs=w.execute_command('cat /workspace/runs').stdout)"


@pytest.fixture
def shared(cluster: Cluster) -> Iterator[str]:
    """A directory that is at /workspace, and that this test sees too."""
    cluster.run("login", ["sh", "-c", "rm -rf ~/healing && mkdir ~/healing"])
    yield "/home/tester/healing"
    cluster.run("login", ["rm", "-rf", "/home/tester/healing"])


@pytest.fixture(params=("paramiko",))
def client(cluster: Cluster, shared: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    made = Client(cluster, connect=request.param, mount_dir=shared, slurm={"nodelist": "n02"})
    yield made
    made.kill()
    cluster.run("login", ["scancel", "--quiet", made.job])


by_each_ssh = pytest.mark.parametrize("client", ROUTES, indirect=True)


def sees(cluster: Cluster, name: str) -> None:
    cluster.run("login", ["sh", "-c", f"until [ -e ~/healing/{name} ]; do sleep 0.05; done"])


def go(cluster: Cluster) -> None:
    cluster.run("login", ["touch", "/home/tester/healing/go"])


def break_ssh(cluster: Cluster, node: str) -> None:
    """Restart sshd, and end the connections that are there: a restart alone leaves them."""
    cluster.call("daemon", "stop", node, "sshd")
    cluster.run(node, ["pkill", "-KILL", "sshd"], user="root")
    cluster.call("daemon", "start", node, "sshd")


def leave(cluster: Cluster, client: Client) -> None:
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


@by_each_ssh
def test_an_sshd_that_is_restarted_under_a_running_command(cluster: Cluster, client: Client) -> None:
    client.do(RUN)
    sees(cluster, "runs")
    break_ssh(cluster, client.node)
    go(cluster)
    assert client.hear("slow") == "done\n"
    client.do(RUNS)
    assert client.hear("runs") == "ran\n"
    leave(cluster, client)


def test_an_sshd_that_is_away_for_a_while_delays_the_next_call(cluster: Cluster, client: Client) -> None:
    cluster.call("daemon", "stop", client.node, "sshd")
    cluster.run(client.node, ["pkill", "-KILL", "sshd"], user="root")
    client.do("import threading; threading.Timer(6, lambda: tell(still_waits=True)).start()")
    client.do("tell(late=w.execute_command('echo late').stdout)")
    client.hear("still_waits")
    assert "late" not in client.told
    cluster.call("daemon", "start", client.node, "sshd")
    assert client.hear("late") == "late\n"
    leave(cluster, client)


@by_each_ssh
def test_a_stream_goes_on_behind_what_has_arrived(cluster: Cluster, client: Client) -> None:
    count = "echo ran >> /workspace/runs; seq 200000; until [ -e /workspace/go ]; do sleep 0.05; done; seq 200000"
    client.do(
        f"exec('''pieces = []\\nfor item in w.stream_command({count!r}, timeout=170):\\n"
        "    pieces.append(item)\\n    if len(pieces) == 1: tell(streams=True)''')\n"
        "out = b''.join(p.data for p in pieces[:-1])\n"
        "tell(out=len(out), whole=out == 2 * ''.join(f'{n}\\n' for n in range(1, 200001)).encode(), code=pieces[-1].exit_code)"
    )
    client.hear("streams")
    break_ssh(cluster, client.node)
    go(cluster)
    client.hear("out")
    assert (client.told["whole"], client.told["code"]) == (True, 0)
    client.do(RUNS)
    assert client.hear("runs") == "ran\n"
    leave(cluster, client)


def test_a_link_that_is_down_for_20_s(cluster: Cluster, client: Client) -> None:
    client.do(RUN)
    sees(cluster, "runs")
    cluster.call("link-cut", client.node)
    # The outage itself is what this is about: nothing tells of its being long enough.
    cluster.run("login", ["sleep", "20"])
    cluster.call("link-mend", client.node)
    go(cluster)
    assert client.hear("slow") == "done\n"
    client.do(RUNS)
    assert client.hear("runs") == "ran\n"
    leave(cluster, client)


def test_a_file_arrives_whole_through_a_break(cluster: Cluster, client: Client) -> None:
    make = "import hashlib, os; data = os.urandom(1 << 20) * 300; open('/tmp/healing', 'wb').write(data)"
    client.do(f"{make}; tell(made=True)")
    client.hear("made")
    client.do(
        "w.file_upload('/tmp/healing', 'up'); tell(up=w.execute_command('sha256sum up', timeout=60).stdout.split()[0])"
    )
    cluster.run("login", ["sh", "-c", "until ls -A ~/healing | grep -q .; do sleep 0.01; done"])
    break_ssh(cluster, client.node)
    client.hear("up")
    client.do("tell(want=hashlib.sha256(data).hexdigest())")
    assert client.told["up"] == client.hear("want")
    client.do("tell(begins=True); w.file_download('up', '/tmp/healing.back')")
    client.do(
        "tell(same=open('/tmp/healing.back', 'rb').read() == data); os.remove('/tmp/healing'); os.remove('/tmp/healing.back')"
    )
    client.hear("begins")
    cluster.run("login", ["sh", "-c", "until ls -A /tmp | grep -q healing.back; do sleep 0.01; done"])
    break_ssh(cluster, client.node)
    assert client.hear("same") is True
    leave(cluster, client)


def test_a_control_master_that_is_killed(cluster: Cluster, shared: str) -> None:
    client = Client(cluster, connect="openssh", mount_dir=shared, slurm={"nodelist": "n02"})
    try:
        client.do(RUN)
        sees(cluster, "runs")
        cluster.run("login", ["pkill", "-KILL", "-u", "tester", "-f", r"ssh: .*\[mux\]"], user="root")
        go(cluster)
        assert client.hear("slow") == "done\n"
        client.do(RUNS)
        assert client.hear("runs") == "ran\n"
        leave(cluster, client)
    finally:
        client.kill()


def test_the_lease_of_a_silent_client_is_taken_anew(cluster: Cluster, client: Client) -> None:
    client.do("from hpc_workspace.launch.watch import watch; watch._at_rest_s = 0.2; watch._changed.set()")
    client.do("lease = w._link._lease; tell(had=lease is not None)")
    client.hear("had")
    break_ssh(cluster, client.node)
    client.do("exec('while w._link._lease in (lease, None): time.sleep(0.05)'); tell(anew=True)")
    assert client.hear("anew")
    leave(cluster, client)


OPEN_SOCKET = """
def open_socket(host):
    from socket import create_connection
    connection = create_connection(("127.0.0.1", int(host.rpartition(":")[2])))
    connection.sendall(
        f"GET /sockets/bash-events?session_api_key={w.api_key} HTTP/1.1\\r\\nHost: x\\r\\nUpgrade: websocket\\r\\n"
        "Connection: Upgrade\\r\\nSec-WebSocket-Version: 13\\r\\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n".encode()
    )
    said = b""
    while b"\\r\\n\\r\\n" not in said:
        said += connection.recv(1)
    return connection, said.split()[1].decode()
"""


def test_other_peoples_clients_get_an_ordinary_close_and_come_back_at_the_same_address(
    cluster: Cluster, client: Client
) -> None:
    client.do(f"exec({OPEN_SOCKET!r}); host = w.host; socket, status = open_socket(host); tell(status=status)")
    assert client.hear("status") == "101"
    client.do("tell(end=len(socket.recv(1000)))")  # a reset would raise
    break_ssh(cluster, client.node)
    assert client.hear("end") == 0
    client.do("socket, status = open_socket(host); tell(again=status, same=w.host == host); socket.close()")
    assert client.hear("again") == "101"
    assert client.hear("same") is True
    leave(cluster, client)


def test_openhands_own_server_runs_a_command_once_too(cluster: Cluster, shared: str) -> None:
    """It knows no ids of ours: the command is found again by its text."""
    client = Client(
        cluster, sif_file=SERVER, image=None, connect="paramiko", mount_dir=shared, slurm={"nodelist": "n02"}
    )
    try:
        client.do(RUN)
        sees(cluster, "runs")
        break_ssh(cluster, client.node)
        go(cluster)
        assert client.hear("slow") == "done\n"
        client.do(RUNS)
        assert client.hear("runs") == "ran\n"
        leave(cluster, client)
    finally:
        client.kill()
