"""Who is at the other end: a stranger who takes a port gets not a byte of the key, and the client an error with a type."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.integration.cluster import PRELUDE, TINY, TOLD, VENV, Cluster

pytestmark = pytest.mark.cluster

NODE = "n01"
# A stranger who listens, answers with what it can, and at the end of its stdin prints what it was sent.
STRANGER = """
import select, socket, sys
family, address = (socket.AF_INET6, "::1") if sys.argv[1] == "6" else (socket.AF_INET, "127.0.0.1")
listener = socket.socket(family, socket.SOCK_STREAM)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((address, int(sys.argv[2])))
listener.listen(16)
print(listener.getsockname()[1], flush=True)
got, open_ones = b"", []
while True:
    ready, _, _ = select.select([listener, sys.stdin, *open_ones], [], [])
    if sys.stdin in ready:
        break
    for one in ready:
        if one is listener:
            connection, _ = listener.accept()
            open_ones.append(connection)
        elif data := one.recv(65536):
            got += data
            one.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}" if b"HTTP" in data else b"HWDOOR1\\n" + bytes(64))
        else:
            open_ones.remove(one)
            one.close()
print(got.hex())
"""


class Stranger:
    """The second user of the node, who listens on a port."""

    def __init__(self, cluster: Cluster, port: int, family: str = "4") -> None:
        argv = cluster.argv(NODE, ["python3", "-c", STRANGER, family, str(port)], user="stranger")
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.port = int(self._process.stdout.readline())

    def received(self) -> bytes:
        out, _ = self._process.communicate("\n", timeout=30)
        return bytes.fromhex(out.strip())


CLIENT = """
w = ApptainerWorkspace(image=TINY).start()
w.execute_command("true")
tell(port=w._record.port, key=w.api_key, warden=warden_of(w), program=program_of(w))
sys.stdin.readline()
tell(error=error_of(lambda: w.execute_command("echo secret-command")))
w.close()
"""


def test_a_stranger_who_takes_a_dead_doors_port_gets_a_nonce_and_nothing_else(cluster: Cluster) -> None:
    client = cluster.open(NODE, [f"{VENV}/python", "-c", PRELUDE + CLIENT])
    assert client.stdout
    told = json.loads(client.stdout.readline().removeprefix(TOLD))
    cluster.kill(NODE, told["warden"], told["program"])
    cluster.run(
        NODE,
        ["sh", "-c", f"rm -rf /tmp/hpcws-*/door.sock; while [ -e /proc/{told['program']} ]; do :; done"],
        user="root",
    )
    stranger = Stranger(cluster, told["port"])
    out, _ = client.communicate("\n", timeout=60)
    error = json.loads(out.removeprefix(TOLD))["error"]
    received = stranger.received()
    assert error["kind"] in ("AuthError", "ContainerError", "TunnelLostError")
    assert told["key"].encode() not in received
    assert b"secret-command" not in received
    # Hellos, each a magic word and a nonce of 32 bytes; never a proof, a wish or a request.
    assert len(received) % 40 == 0
    assert all(received[start:].startswith(b"HWDOOR1\n") for start in range(0, len(received), 40))
    assert cluster.leftovers([NODE]) == {}


def test_a_listener_on_ipv6_and_a_proxy_of_the_environment_get_nothing(cluster: Cluster) -> None:
    proxy = Stranger(cluster, 0)
    code = """
import socket
with ApptainerWorkspace(image=TINY, host_port=18040) as w:
    tell(said=w.execute_command("echo hello").stdout, http=w.client.get("/server_info").status_code, alive=w.alive)
"""
    on_ipv6 = Stranger(cluster, 18040, "6")
    url = f"http://127.0.0.1:{proxy.port}"
    environment = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"), url)
    told = cluster.tell(NODE, code, env=environment)
    assert (told["said"], told["http"], told["alive"]) == ("hello\n", 200, True)
    assert proxy.received() == b""
    assert on_ipv6.received() == b""


def test_a_stranger_can_not_take_the_port_that_openhands_server_was_given(cluster: Cluster) -> None:
    """The server is dead and the node program is stopped before it can notice: the door must refuse by itself."""
    script = (
        "#!/bin/sh\nexec python3 -c 'import http.server, sys\n"
        + (
            "class H(http.server.BaseHTTPRequestHandler):\n"
            "    def do_GET(self):\n"
            '        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")\n'
            's = http.server.HTTPServer(("127.0.0.1", int(sys.argv[4])), H)\n'
            "print(sys.argv[4], flush=True)\n"
            'while s.socket.fileno() > 0 and not __import__("os").path.exists("/workspace/shut"):\n'
            "    s.timeout = 0.05; s.handle_request()\n"
            "s.server_close()\n"
            'print("closed", flush=True)\n'
            '__import__("signal").pause()\n'
        )
        + '\' "$@"\n'
    )
    code = f"""
script = Path("/tmp/runscript")
script.write_text({script!r})
script.chmod(0o755)
shared = Path("/tmp/given"); shared.mkdir(exist_ok=True)
w = ApptainerWorkspace(sif_file=TINY, mount_dir="/tmp/given",
                       extra_bind_mounts=["/tmp/runscript:/.singularity.d/runscript"]).start()
(shared / "shut").touch()
while "closed" not in w.logs():
    pass
tell(port=int(w.logs().split()[0]), key=w.api_key)
sys.stdin.readline()
tell(error=error_of(lambda: w.execute_command("echo secret-command")))
w.close()
script.unlink(); (shared / "shut").unlink(); shared.rmdir()
"""
    client = cluster.open(NODE, [f"{VENV}/python", "-c", PRELUDE + code])
    assert client.stdout
    told = json.loads(client.stdout.readline().removeprefix(TOLD))
    stranger = Stranger(cluster, told["port"])
    out, said = client.communicate("\n", timeout=60)
    assert out, said
    error = json.loads(out.removeprefix(TOLD))["error"]
    assert error["kind"] == "ServerUnavailableError"
    assert "is not this workspace's" in error["text"]
    assert stranger.received() == b""
    assert TINY not in error["text"]
