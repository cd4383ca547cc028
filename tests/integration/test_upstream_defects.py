"""What OpenHands' ApptainerWorkspace (1.58) gets wrong, each a test that ours does not: real Apptainer, ordinary user.

The list is FIELD_NOTES.md's; a test is named after the defect that it would find. Where a server must misbehave on
cue (die, be slow, print much), it is a small one of the test's own, put in the place of the image's.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from hpc_workspace import ApptainerWorkspace, errors
from tests.integration.cluster import PRELUDE, TOLD, VENV, Cluster

pytestmark = pytest.mark.cluster

NODE, LOGIN = "n02", "login"
SECRET = "value-for-nobody-else"
PIECE_DONE = "DONE"

# Runs the pieces of Python that it reads, one a line, with one set of names.
RUN_PIECES = f"""{PRELUDE}
import threading, traceback, urllib.request
from hpc_workspace import procfs
TMP = os.environ["TMPDIR"]
def family_of(w):
    return [procfs.read_process(warden_of(w)), *procfs.descendants(warden_of(w))]
def listeners_of(w):
    "Address and port, as /proc/net/tcp writes them, of all that the workspace's processes listen on."
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path("/proc/net", table).read_text().splitlines()[1:]]
    mine = lambda inode: any(procfs.holds_socket(process.pid, int(inode)) for process in family_of(w))
    return [row[1].split(":") for row in rows if row[3] == "0A" and mine(row[9])]
def server_of(w):
    "The agent server's process."
    words = lambda process: Path(f"/proc/{{process.pid}}/cmdline").read_bytes()
    return [p for p in family_of(w) if p.name != "tini" and (b"serve.py" in words(p) or b"agent_server" in words(p))][-1]
for line in sys.stdin:
    try:
        exec(json.loads(line), globals())
    except BaseException:
        tell(wrong=traceback.format_exc())
    print({PIECE_DONE!r}, flush=True)
"""

# Prints what processes and scratch directories carry a mark, when none is left or after a while.
FIND_LEFT = """
import os, sys, time
from pathlib import Path
mark, spared = sys.argv[1], [os.getpid(), *map(int, sys.argv[2:])]
def left():
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, *more = (Path(folder, name).read_bytes() for name in ("cmdline", "environ", "mountinfo"))
        except OSError:
            continue
        if any(mark.encode() in said for said in (words, *more)) and int(folder.name) not in spared:
            yield f"{folder.name} {words.decode(errors='replace').replace(chr(0), ' ')}"
    yield from map(str, Path(mark).glob("hpcws-*"))
give_up = time.monotonic() + 15
while (found := list(left())) and time.monotonic() < give_up:
    time.sleep(0.1)
print(*found, sep="\\n", end="")
"""

# An agent server in the place of the image's, for `run`: `wish` says how it misbehaves.
OWN_SERVER = """#!/usr/bin/python3
import http.server, signal, socket, sys, time
wish = {wish!r}
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
port = int(sys.argv[sys.argv.index("--port") + 1])
print("the server says " + "x" * wish.get("chatter", 0), flush=True)
while wish.get("wait_for_stranger") and socket.socket().connect_ex(("127.0.0.1", port)):
    time.sleep(0.02)
class Handler(http.server.BaseHTTPRequestHandler):
    refusals = wish.get("refusals", 0)
    def do_GET(self):
        Handler.refusals -= 1
        self.send_response(503 if Handler.refusals >= 0 else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{{}}")
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# Listens on a port (or on each that a server of `OWN_SERVER` is to have), says that all is well, and keeps what it hears.
STRANGER = """
import json, socket, sys, threading, time
from pathlib import Path
heard = {"connections": 0, "bytes": ""}
def serve(port):
    listener = socket.create_server(("127.0.0.1", port))
    print("listening", flush=True)
    while True:
        connection, _ = listener.accept()
        heard["connections"] += 1
        threading.Thread(target=answer, args=(connection,), daemon=True).start()
def answer(connection):
    while data := connection.recv(65536):
        heard["bytes"] += data.decode("latin-1")
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
def squat():
    taken = set()
    while True:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = file.read_bytes().split(b"\\0")
            except OSError:
                continue
            is_own = words[0] == b"/usr/bin/python3" and b"/.singularity.d/runscript" in words
            if is_own and (port := int(words[words.index(b"--port") + 1])) not in taken:
                taken.add(port)
                threading.Thread(target=serve, args=(port,), daemon=True).start()
        time.sleep(0.01)
threading.Thread(target=serve if sys.argv[1:] else squat, args=map(int, sys.argv[1:]), daemon=True).start()
sys.stdin.read()
print(json.dumps(heard), flush=True)
"""


class Client:
    """A Python process in a node that runs pieces of code; all of its workspaces carry `tmp` as a mark."""

    def __init__(self, cluster: Cluster, tmp: str, node: str = NODE, **env: str) -> None:
        self.tmp, self._cluster, self._node = tmp, cluster, node
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open for as long as the client is
        pairs = {"TMPDIR": tmp, "HPC_WORKSPACE_HOME": f"{tmp}/state", **env}
        command = ["env", *(f"{name}={value}" for name, value in pairs.items()), f"{VENV}/python", "-c", RUN_PIECES]
        self._process = subprocess.Popen(
            cluster.argv(node, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.pid = int(self.tell("tell(pid=os.getpid())")["pid"])

    def send(self, code: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """What the piece told, once it is done. One that fails fails the test."""
        assert self._process.stdout
        told: dict[str, Any] = {}
        for line in self._process.stdout:
            if line.startswith(TOLD):
                told |= json.loads(line.removeprefix(TOLD))
            if line.strip() == PIECE_DONE:
                assert "wrong" not in told, told["wrong"]
                return told
        raise AssertionError(f"the client ended: {self.end()}")

    def tell(self, code: str) -> dict[str, Any]:
        self.send(code)
        return self.receive()

    def kill(self, signal: str) -> None:
        self._cluster.run(self._node, ["kill", "-s", signal.removeprefix("SIG"), str(self.pid)])
        self._process.wait(30)

    def end(self) -> str:
        """Let it come to its end, if it has not; returns what it wrote to stderr."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=60)
        self._errors.seek(0)
        return self._errors.read()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    @property
    def returncode(self) -> int | None:
        return self._process.returncode


def left_on(cluster: Cluster, node: str, tmp: str, *spared_pids: int) -> str:
    """Processes and scratch that carry the mark `tmp`; empty when all is gone."""
    return cluster.run(node, ["python3", "-c", FIND_LEFT, tmp, *map(str, spared_pids)], user="root").stdout


@contextlib.contextmanager
def marked_directory(cluster: Cluster, node: str) -> Iterator[str]:
    """A directory of the node's own for scratch and state; in the end, nothing that was started with it is left."""
    tmp = cluster.run(node, ["mktemp", "-d", "/tmp/defects-XXXXXX"]).stdout.strip()
    try:
        yield tmp
    finally:
        left = left_on(cluster, node, tmp)
        cluster.run(node, ["rm", "-rf", tmp], user="root")
    assert left == ""


@contextlib.contextmanager
def stranger(cluster: Cluster, *port: int) -> Iterator[subprocess.Popen[str]]:
    """`STRANGER`, as another user of the node; `heard_by` ends it."""
    command = ["python3", "-c", STRANGER, *map(str, port)]
    argv = cluster.argv(NODE, command, user="stranger")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def heard_by(listening: subprocess.Popen[str]) -> dict[str, Any]:
    return dict(json.loads(listening.communicate(timeout=30)[0].splitlines()[-1]))


def own_server(**wish: Any) -> str:
    """Code that makes `OPTIONS`: those of a workspace with a server that misbehaves as `wish` says."""
    return f"""
script = Path(TMP, "runscript")
script.write_text({OWN_SERVER.format(wish=wish)!r})
script.chmod(0o755)
OPTIONS = dict(sif_file=TINY, extra_bind_mounts=[f"{{script}}:/.singularity.d/runscript"])
"""


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    """A client with nothing started; nothing of it may be left in the end."""
    with marked_directory(cluster, NODE) as tmp, Client(cluster, tmp) as client:
        yield client


# What is on argv while it starts is seen by looking all the time.
START = """
os.environ["SECRET"] = {secret!r}
argvs, started = set(), threading.Event()
def watch():
    while not started.wait(0.05):
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                argvs.add(file.read_bytes().decode(errors="replace"))
            except OSError:
                pass
threading.Thread(target=watch, daemon=True).start()
w = ApptainerWorkspace({options}, forward_env=["SECRET"]).start()
started.set()
"""


@contextlib.contextmanager
def open_client(cluster: Cluster, options: str) -> Iterator[Client]:
    """A client with an open workspace `w`, and in `argvs` every command line of the node during its start."""
    with marked_directory(cluster, NODE) as tmp, Client(cluster, tmp) as client:
        client.tell(START.format(secret=SECRET, options=options))
        yield client


@pytest.fixture(scope="module")
def bundled(cluster: Cluster) -> Iterator[Client]:
    with open_client(cluster, "image=TINY") as client:
        yield client


@pytest.fixture(scope="module")
def openhands(cluster: Cluster) -> Iterator[Client]:
    with open_client(cluster, "sif_file=SERVER") as client:
        yield client


@pytest.fixture(params=["bundled", "openhands"])
def opened(request: pytest.FixtureRequest) -> Client:
    """A client with an open workspace `w`, of either server."""
    found: Client = request.getfixturevalue(request.param)
    return found


def test_defect_the_key_and_env_values_are_on_argv(cluster: Cluster, opened: Client) -> None:
    told = opened.tell("tell(key=w.api_key, argvs=[*argvs], secret=w.execute_command('echo $SECRET').stdout)")
    now = cluster.run(NODE, ["ps", "-eo", "args"], user="root").stdout
    assert told["secret"] == f"{SECRET}\n"
    assert any("apptainer" in argv for argv in told["argvs"])
    for argv in [*told["argvs"], now]:
        assert told["key"] not in argv
        assert SECRET not in argv


def test_defect_it_binds_every_address(cluster: Cluster, opened: Client) -> None:
    listeners = opened.tell("tell(listeners=listeners_of(w))")["listeners"]
    assert {address for address, _ in listeners} == {"0100007F"}
    ports = [int(port, 16) for _, port in listeners]
    reach = f"import socket; print([p for p in {ports} if not socket.socket().connect_ex(('{NODE}', p))])"
    assert cluster.run(LOGIN, ["python3", "-c", reach]).stdout == "[]\n"


def test_defect_the_key_is_optional(cluster: Cluster, opened: Client) -> None:
    told = opened.tell("tell(url=w.host, listeners=listeners_of(w), kind=w._record.server)")
    doors = [told["url"], *(f"http://127.0.0.1:{int(port, 16)}" for _, port in told["listeners"])]
    script = 'for u in "$@"; do curl -s -m 5 -o /dev/null -w "%{http_code} " -d \'{"command": "id"}\' '
    script += "-H 'Content-Type: application/json' $u/api/bash/execute_bash_command; done"
    codes = cluster.run(NODE, ["sh", "-c", script, "sh", *doors], user="stranger").stdout.split()
    assert len(codes) == len(doors)
    assert set(codes) <= {"000", "401"}
    assert ("401" in codes) == (told["kind"] == "image")  # OpenHands' own port is there to be reached; ours has none


def test_defect_it_trusts_any_listener_that_answers_health_at_the_start(cluster: Cluster, client: Client) -> None:
    """The server finds its port taken by a stranger who says that all is well, and dies of it; so does the second."""
    with stranger(cluster) as squatter:
        code = f"{own_server(wait_for_stranger=True)}\ntell(error=error_of(ApptainerWorkspace(**OPTIONS).start))"
        error = client.tell(code)["error"]
        heard = heard_by(squatter)
    assert error["kind"] == "ContainerError"
    assert "Address already in use" in error["text"]
    assert heard["connections"] > 0
    assert heard["bytes"] == ""


def test_defect_an_explicit_api_key_is_ignored() -> None:
    """Upstream has the option and makes a key of its own. We have none: that must be said. Nothing needs to run."""
    with pytest.raises(errors.ConfigError, match="no option 'api_key'") as caught:
        ApptainerWorkspace(image="tiny.sif", api_key="mine")
    assert caught.value.option == "api_key"
    assert "mine" not in str(caught.value)


def test_defect_the_container_outlives_a_failed_start(cluster: Cluster, client: Client) -> None:
    code = "tell(error=error_of(ApptainerWorkspace(image=TINY, health_check_timeout=0.1).start))"
    assert client.tell(code)["error"]["kind"] == "ServerNotReadyError"
    assert left_on(cluster, NODE, client.tmp, client.pid) == ""


def test_defect_the_container_outlives_a_normal_exit_without_cleanup(cluster: Cluster, client: Client) -> None:
    client.tell("w = ApptainerWorkspace(image=TINY).start()")
    client.end()
    assert client.returncode == 0
    assert left_on(cluster, NODE, client.tmp) == ""


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL", "SIGHUP"])
def test_defect_the_container_outlives_its_client_killed_by(cluster: Cluster, client: Client, signal: str) -> None:
    client.tell("w = ApptainerWorkspace(image=TINY).start()")
    client.kill(signal)
    assert left_on(cluster, NODE, client.tmp) == ""


def test_defect_the_container_outlives_a_client_killed_while_it_starts(cluster: Cluster, client: Client) -> None:
    client.send("w = ApptainerWorkspace(image=TINY).start()")
    seen = "until ls -d $0/hpcws-* >/dev/null 2>&1; do sleep 0.01; done"
    cluster.run(NODE, ["sh", "-c", seen, client.tmp], timeout_s=30)
    client.kill("SIGKILL")
    assert left_on(cluster, NODE, client.tmp) == ""


def test_defect_without_detach_logs_a_full_pipe_is_a_deadlock(client: Client) -> None:
    told = client.tell(f"""{own_server(chatter=2**20)}
with ApptainerWorkspace(**OPTIONS, detach_logs=False, health_check_timeout=30) as w:
    tell(length=len(w.logs()))""")
    assert told["length"] > 2**20


def test_defect_an_early_death_shows_no_log(client: Client) -> None:
    """An image that holds no agent server: its entrypoint, a shell, refuses the arguments."""
    code = "tell(error=error_of(ApptainerWorkspace(sif_file='/shared/images/busybox.sif').start))"
    error = client.tell(code)["error"]
    assert error["kind"] == "ContainerError"
    assert "ended with exit code 2" in error["text"]
    assert "/bin/sh: can't open '127.0.0.1'" in error["text"]


def test_defect_log_lines_go_to_the_callers_stdout(cluster: Cluster, client: Client) -> None:
    code = f"""{PRELUDE}
import logging
logging.basicConfig(level=logging.INFO)
TMP = {client.tmp!r}
{own_server()}
with ApptainerWorkspace(**OPTIONS) as w:
    assert "the server says" in w.logs()
"""
    ended = cluster.python(NODE, code)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert "the server says" in ended.stderr


def test_defect_cleanup_always_waits_two_seconds(client: Client) -> None:
    told = client.tell("""
took_s = []
for _ in range(2):
    w = ApptainerWorkspace(image=TINY).start()
    began_s = time.monotonic()
    w.cleanup()
    took_s.append(time.monotonic() - began_s)
tell(took_s=took_s)""")
    assert min(told["took_s"]) < 1.0


def test_defect_it_can_not_be_pickled(bundled: Client) -> None:
    told = bundled.tell("""
import pickle
code = "import pickle, sys; w = pickle.load(sys.stdin.buffer); print(w.id, w.execute_command('echo here').stdout)"
ended = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(w), capture_output=True)
tell(id=w.id, out=ended.stdout.decode(), err=ended.stderr.decode(), secret=w.api_key.encode() in pickle.dumps(w))""")
    assert told["out"].split() == [told["id"], "here"], told["err"]
    assert told["secret"] is False


def test_defect_a_missing_apptainer_is_a_file_not_found_error(client: Client) -> None:
    told = client.tell("""
os.environ["PATH"] = "/nowhere"
try:
    ApptainerWorkspace(sif_file=SERVER).start()
except RuntimeError as error:
    tell(kind=type(error).__name__, text=str(error))""")
    assert told["kind"] == "PrerequisiteError"
    assert told["text"].startswith("Apptainer is not available")


# --- images from a registry, on the login node ---

PULL = """
NAME = "docker://login:5000/defects"
def marker_of(name, **options):
    "What /marker says in an image of the registry, in a workspace of its own."
    with ApptainerWorkspace(image=f"{NAME}/{name}", cache_dir=f"{TMP}/store", **options) as w:
        return w.execute_command("cat /marker").stdout.strip()
"""
# $1: a directory; then pairs of a name in the registry and what /marker is to say there.
PUSH = """
set -e; mkdir -p $1; cd $1; rm -rf oci; cp -r /srv/images/busybox-*.oci oci; shift
while [ $# -gt 0 ]; do
    echo $2 > marker; umoci insert --image oci:latest --tag new marker /marker
    skopeo --insecure-policy copy --quiet --dest-tls-verify=false oci:oci:new docker://login:5000/defects/$1; shift 2
done
"""
# $1: a directory; pushes one name with an image for each of two platforms.
PUSH_PLATFORMS = """
set -e; mkdir -p $1; cd $1; rm -rf oci; cp -r /srv/images/busybox-*.oci oci
for arch in amd64 arm64; do
    echo $arch > marker; umoci insert --image oci:latest --tag $arch marker /marker
    umoci config --image oci:$arch --architecture $arch
done
python3 - <<'END'
import hashlib, json
from pathlib import Path
known = json.loads(Path("oci/index.json").read_text())
images = {m.pop("annotations")["org.opencontainers.image.ref.name"]: m for m in known["manifests"]}
listed = [images[a] | {"platform": {"os": "linux", "architecture": a}} for a in ("amd64", "arm64")]
kind = "application/vnd.oci.image.index.v1+json"
blob = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": listed}).encode()
digest = hashlib.sha256(blob).hexdigest()
Path("oci/blobs/sha256", digest).write_bytes(blob)
named = {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(blob)}
named["annotations"] = {"org.opencontainers.image.ref.name": "both"}
Path("oci/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
END
skopeo --insecure-policy copy --all --quiet --dest-tls-verify=false oci:oci:both docker://login:5000/defects/arch
"""


def push(cluster: Cluster, puller: Client, script: str, *arguments: str) -> None:
    ended = cluster.run(LOGIN, ["sh", "-c", script, "sh", f"{puller.tmp}/push", *arguments], user="root")
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def pullers(cluster: Cluster) -> Iterator[list[Client]]:
    """Three clients on the login node, with one store (empty at first) and one home between them."""
    with marked_directory(cluster, LOGIN) as tmp, contextlib.ExitStack() as ends:
        cluster.run(LOGIN, ["mkdir", f"{tmp}/home"])
        env = {"APPTAINER_NOHTTPS": "1", "HOME": f"{tmp}/home"}
        clients = [ends.enter_context(Client(cluster, tmp, LOGIN, **env)) for _ in range(3)]
        for client in clients:
            client.tell(PULL)
        yield clients


def test_defect_of_three_concurrent_cold_starts_two_fail(cluster: Cluster, pullers: list[Client]) -> None:
    push(cluster, pullers[0], PUSH, "cold:latest", "cold")
    for puller in pullers:
        puller.send("tell(marker=marker_of('cold:latest'))")
    assert [puller.receive()["marker"] for puller in pullers] == ["cold"] * 3


def test_defect_different_references_share_one_sif_name(cluster: Cluster, pullers: list[Client]) -> None:
    names = ["a/b:c", "a_b:c", "a/b_c"]
    push(cluster, pullers[0], PUSH, *(word for name in names for word in (name, f"is-{name}")))
    told = pullers[0].tell(f"tell(markers=[marker_of(name) for name in {names}])")
    assert told["markers"] == [f"is-{name}" for name in names]


def test_defect_platform_does_nothing(cluster: Cluster, pullers: list[Client]) -> None:
    push(cluster, pullers[0], PUSH_PLATFORMS)
    told = pullers[0].tell("""
def pulled(arch):
    argv = [str(Path(sys.executable).parent / "hpc-workspace"), "images", "pull", f"--store={TMP}/store", f"--platform=linux/{arch}", f"{NAME}/arch"]
    path = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    with ApptainerWorkspace(image=path, cache_dir=f"{TMP}/store") as w:
        return w.execute_command("cat /marker").stdout.strip()
tell(markers=[pulled(arch) for arch in ("arm64", "amd64")])""")
    assert told["markers"] == ["arm64", "amd64"]


@pytest.mark.parametrize("policy", ["newer", "always"])
def test_defect_latest_is_never_refreshed(cluster: Cluster, pullers: list[Client], policy: str) -> None:
    markers = []
    for version in ("old", "new"):
        push(cluster, pullers[0], PUSH, "refresh:latest", version)
        markers += [pullers[0].tell(f"tell(marker=marker_of('refresh', pull_policy={policy!r}))")["marker"]]
    assert markers == ["old", "new"]


def test_defect_blobs_fill_home_whatever_cache_dir_says(cluster: Cluster, pullers: list[Client]) -> None:
    told = pullers[0].tell("""
marker_of("cold", pull_policy="newer")
tell(home=[str(f) for f in Path.home().rglob("*") if f.is_file() and f.stat().st_size > 65536],
     blobs=[str(f) for f in Path(TMP, "store").rglob("layers/*")])""")
    assert told["blobs"]
    assert told["home"] == []


# --- ports ---


def test_defect_extra_ports_does_nothing(client: Client) -> None:
    told = client.tell("""
with ApptainerWorkspace(image=TINY) as w:
    without = w.extra_ports
with ApptainerWorkspace(image=TINY, extra_ports=True) as w:
    port, url = w._record.extra_ports["vnc"], w.extra_ports["vnc"].url
    w.execute_command(f"cd /tmp && echo served > it && (python3 -m http.server -b 127.0.0.1 {port} >/dev/null 2>&1 &)"
        f" && until (: </dev/tcp/127.0.0.1/{port}) 2>/dev/null; do :; done", timeout=20)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    tell(without=without, names=sorted(w.extra_ports), text=direct.open(url + "/it", timeout=10).read().decode())""")
    assert told["without"] == {}
    assert told["names"] == ["vnc", "vscode"]
    assert told["text"] == "served\n"


def test_defect_host_port_can_not_be_reused_at_once(client: Client) -> None:
    """Each workspace ends while a connection to its port is open, so that the port is left in TIME_WAIT."""
    told = client.tell("""
import http.client
codes = []
for _ in range(3):
    with ApptainerWorkspace(image=TINY, host_port=18731) as w:
        connection = http.client.HTTPConnection("127.0.0.1", 18731)
        connection.request("GET", "/health")
        codes.append([w.host, connection.getresponse().status])
tell(codes=codes)""")
    assert told["codes"] == [["http://127.0.0.1:18731", 200]] * 3


# Uses up the few ports of a network of its own, in which it is run.
EXHAUST = """
import socket
w = ApptainerWorkspace(image=TINY).start()
held = []
try:
    while True:
        held.append(socket.create_server(("127.0.0.1", 0)))
except OSError:
    pass
tell(host=error_of(lambda: w.host), start=error_of(ApptainerWorkspace(image=TINY).start))
w.close()
"""


def test_defect_port_exhaustion_is_minus_one(cluster: Cluster, client: Client) -> None:
    few = "ip link set lo up; echo 40000 40009 >/proc/sys/net/ipv4/ip_local_port_range; "
    few += "exec setpriv --reuid=tester --regid=tester --init-groups env HOME=/home/tester "
    few += f'TMPDIR={client.tmp} HPC_WORKSPACE_HOME={client.tmp}/state {VENV}/python -c "$0"'
    ended = cluster.run(NODE, ["unshare", "--net", "sh", "-c", few, PRELUDE + EXHAUST], user="root")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.removeprefix(TOLD))
    assert told["host"]["kind"] == "PrerequisiteError"
    assert told["start"]["kind"] in ("PrerequisiteError", "ContainerError")
    for error in (told["host"], told["start"]):
        assert "None" not in error["text"]
        assert "port" in error["text"].lower() or "Address already in use" in error["text"]


# --- commands and files ---


def test_defect_http_401_becomes_exit_code_minus_one(opened: Client) -> None:
    error = opened.tell("""
w.client.headers["X-Session-API-Key"] = "wrong"
error = error_of(lambda: w.execute_command("true"))
w.client.headers["X-Session-API-Key"] = w.api_key
tell(error=error)""")["error"]
    assert error["kind"] == "ServerResponseError"
    assert "answered 401" in error["text"]


@pytest.mark.parametrize("dies", ["server_of(w).pid", "program_of(w)"])
def test_defect_transport_errors_are_raw_httpx(client: Client, dies: str) -> None:
    """What is not of our own kinds fails the piece of code, and the test."""
    told = client.tell(f"""
w = ApptainerWorkspace(image=TINY).start()
stream = w.stream_command("echo up; sleep 60")
first = next(stream).data.decode()
os.kill({dies}, signal.SIGKILL)
tell(first=first, during=error_of(lambda: [*stream]), after=error_of(lambda: w.execute_command("true")))
w.close()""")
    assert told["first"] == "up\n"
    assert told["during"]["kind"] == told["after"]["kind"] == "ContainerError"


def test_defect_a_timeout_of_half_a_second_is_none_at_all(opened: Client) -> None:
    told = opened.tell("""
done = w.execute_command("sleep 0.2; echo done", timeout=0.5)
began_s = time.monotonic()
late = w.execute_command("sleep 30", timeout=0.5)
tell(done=done.model_dump(), late=late.timeout_occurred, took_s=time.monotonic() - began_s)""")
    assert (told["done"]["exit_code"], told["done"]["stdout"]) == (0, "done\n")
    assert told["late"] is True
    assert 0.5 <= told["took_s"] < 5


def test_defect_partial_output_is_lost_on_a_timeout(opened: Client) -> None:
    told = opened.tell("tell(**w.execute_command('echo out; echo err >&2; sleep 30', timeout=1).model_dump())")
    assert (told["timeout_occurred"], told["stdout"], told["stderr"]) == (True, "out\n", "err\n")


UPLOAD = """
def kib(field):
    return int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0])
big = Path(TMP, "big")
with big.open("wb") as file:
    for _ in range({mib}):
        file.write(os.urandom(2**20))
big.chmod(0o751)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, proc(5)
before = kib("VmRSS")
w.file_upload(big, "big")
grown_mib = (kib("VmHWM") - before) / 1024
same = w.execute_command("stat -c %a big; sha256sum < big; rm big", timeout=60).stdout.split()[:2]
tell(grown_mib=grown_mib, arrived=same, sent=subprocess.getoutput(f"sha256sum < {{big}}").split()[0])
big.unlink()
"""


@pytest.mark.parametrize(("server", "mib"), [("bundled", 256), ("openhands", 64)])
def test_defect_an_upload_is_held_in_the_clients_memory_and_loses_its_exec_bit(
    request: pytest.FixtureRequest, server: str, mib: int
) -> None:
    """64 MiB to OpenHands' server, which takes 17 s for 256; upstream's client grows by three times the size."""
    told = request.getfixturevalue(server).tell(UPLOAD.format(mib=mib))
    assert told["arrived"] == ["751", told["sent"]]
    assert told["grown_mib"] < mib / 4


def test_defect_health_is_polled_once_a_second(client: Client) -> None:
    """The server is not well the first ten times that it is asked."""
    told = client.tell(f"""{own_server(refusals=10)}
with ApptainerWorkspace(**OPTIONS) as w:
    tell(took_s=w.phases_s["node.server"])""")
    assert told["took_s"] < 5


# --- the last two: they leave OpenHands' server busy, and dead ---


def test_defect_http_500_becomes_exit_code_minus_one(openhands: Client) -> None:
    """OpenHands' server answers 500 to a command when it can't write down its events."""
    error = openhands.tell("""
events = Path(w._record.node_scratch, "run/state/bash_events")
aside = events.rename(events.with_name("aside"))
events.touch()
other = Workspace.attach(w.id)
error = error_of(lambda: other.execute_command("true"))
other.disconnect()
events.unlink()
aside.rename(events)
tell(error=error)""")["error"]
    assert error["kind"] == "ServerResponseError"
    assert "answered 500" in error["text"]


def test_defect_the_key_is_sent_to_a_stranger_on_a_dead_servers_port(cluster: Cluster, openhands: Client) -> None:
    """The server's parent in the container is stopped, so that the death is not noticed before the stranger is asked."""
    port = openhands.tell("""
server = server_of(w)
door = w._record.port
port = next(int(port, 16) for _, port in listeners_of(w) if int(port, 16) != door)
os.kill(server.parent_pid, signal.SIGSTOP)
os.kill(server.pid, signal.SIGKILL)
tell(port=port)""")["port"]
    with stranger(cluster, port) as squatter:
        assert squatter.stdout and squatter.stdout.readline() == "listening\n"
        told = openhands.tell("""
import socket
tell(error=error_of(lambda: w.execute_command("true")), alive=w.alive)
with socket.create_connection(("127.0.0.1", port)) as control:
    control.sendall(b"what is said is heard")
    control.recv(100)
os.kill(server.parent_pid, signal.SIGCONT)
w.close()""")
        heard = heard_by(squatter)
    assert heard["connections"] > 1
    assert heard["bytes"] == "what is said is heard"
    assert told["alive"] is False
    assert "is not this workspace's" in told["error"]["text"]
    assert told["error"]["kind"] == "ServerUnavailableError"
