"""Starts: many at once, falling back where a machine can't do what was asked, trying again where a server died."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.cluster import PRELUDE, TOLD, VENV, Cluster

pytestmark = pytest.mark.cluster

NODE = "n01"


def test_32_at_once_on_one_node_all_start(cluster: Cluster) -> None:
    told = cluster.tell(
        NODE,
        """
from concurrent.futures import ThreadPoolExecutor
all = [ApptainerWorkspace(image=TINY) for _ in range(32)]
with ThreadPoolExecutor(32) as pool:
    list(pool.map(lambda w: w.start(), all))
    tell(alive=sum(w.alive for w in all), gates=[w.phases_s["node.gate"] for w in all],
         servers=[w.phases_s["node.server"] for w in all])
    list(pool.map(lambda w: w.close(), all))
""",
        timeout_s=300,
    )
    assert told["alive"] == 32
    assert max(told["gates"]) > min(told["servers"])  # some waited until others answered
    assert cluster.leftovers([NODE]) == {}


def test_the_time_at_the_gate_does_not_count_as_the_servers(cluster: Cluster) -> None:
    told = cluster.tell(
        NODE,
        """
import threading
from hpc_workspace.node.gates import Gate, slots
gates = [Gate("node", slots()[1]) for _ in range(slots()[1])]
tell(held=all([gate.try_acquire() for gate in gates]))
w = ApptainerWorkspace(image=TINY, health_check_timeout=5)
errors = []
thread = threading.Thread(target=lambda: errors.append(error_of(w.start)))
thread.start()
thread.join(6)  # longer than the server may take
tell(waiting=thread.is_alive())
for gate in gates:
    gate.release()
thread.join()
tell(errors=errors, gate=w.phases_s["node.gate"])
w.close()
""",
    )
    assert told["held"] is True
    assert told["waiting"] is True
    assert told["errors"] == [None]
    assert told["gate"] > 5


RUNSCRIPT = """#!/bin/sh
if [ ! -e /workspace/died ]; then touch /workspace/died; echo dying at my {ordinal} start; exit 7; fi
{then}
exec python3 -c '
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{{}}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[4])), Health).serve_forever()
' "$@"
"""
DYING = """
script = Path("/tmp/runscript")
script.write_text({script!r})
script.chmod(0o755)
w = ApptainerWorkspace(sif_file=TINY, extra_bind_mounts=["/tmp/runscript:/.singularity.d/runscript"])
tell(error=error_of(w.start), log=w.logs())
tell(alive=w.alive)
w.close()
script.unlink()
"""


def test_an_openhands_server_that_dies_at_its_start_is_tried_once_more(cluster: Cluster) -> None:
    script = RUNSCRIPT.format(ordinal="first", then="")
    told = cluster.tell(NODE, DYING.format(script=script))
    assert told["error"] is None
    assert told["log"].count("dying at my first start") == 1
    assert told["alive"] is True


def test_one_that_dies_again_is_an_error_with_its_last_words(cluster: Cluster) -> None:
    script = RUNSCRIPT.format(ordinal="first", then="echo dying for good; exit 8")
    told = cluster.tell(NODE, DYING.format(script=script))
    assert told["error"]["kind"] == "ContainerError"
    assert "ended with exit code 8" in told["error"]["text"]
    assert "dying for good" in told["error"]["text"]
    assert cluster.leftovers([NODE]) == {}


@contextmanager
def changed(cluster: Cluster, do: str, undo: str) -> Iterator[None]:
    assert cluster.run(NODE, ["sh", "-ec", do], user="root").returncode == 0
    try:
        yield
    finally:
        assert cluster.run(NODE, ["sh", "-ec", undo], user="root").returncode == 0


LOOK = """
with ApptainerWorkspace(image=TINY) as w:
    tell(uid=w.execute_command("id -u").stdout.strip(), own=str(os.getuid()), notices=w.notices,
         wrote=w.execute_command("touch /workspace/x /tmp/x && echo wrote").stdout)
"""


def test_without_fakeroot_it_starts_as_yourself_and_says_why(cluster: Cluster) -> None:
    with changed(
        cluster, "chmod u-s /usr/bin/newuidmap /usr/bin/newgidmap", "chmod u+s /usr/bin/newuidmap /usr/bin/newgidmap"
    ):
        told = cluster.tell(NODE, LOOK)
    assert told["uid"] == told["own"]
    assert told["wrote"] == "wrote\n"
    assert len(told["notices"]) == 1
    assert "use_fakeroot: not possible here, going on without it" in told["notices"][0]
    assert "newgidmap" in told["notices"][0]
    assert "use_fakeroot: not possible here" in told["stderr"]
    assert cluster.leftovers([NODE]) == {}


def test_without_subordinate_ids_it_says_what_root_can_not_do(cluster: Cluster) -> None:
    hide = "sed -i s/^tester:/#tester:/ /etc/subuid /etc/subgid"
    with changed(cluster, hide, "sed -i s/^#tester:/tester:/ /etc/subuid /etc/subgid"):
        told = cluster.tell(NODE, LOOK)
    assert told["uid"] == "0"
    assert "no lines in /etc/subuid" in told["notices"][0]


def test_without_overlays_it_starts_with_what_there_is_and_says_why(cluster: Cluster) -> None:
    conf = "/etc/apptainer/apptainer.conf"
    off, on = (f"sed -i 's/^enable overlay = .*/enable overlay = {word}/' {conf}" for word in ("no", "yes"))
    before = cluster.run(NODE, ["grep", "^enable overlay", conf], user="root").stdout.strip()
    with changed(cluster, off, on.replace("= yes/", f"= {before.partition('= ')[2]}/")):
        told = cluster.tell(NODE, LOOK)
    assert told["uid"] == "0"
    assert told["wrote"] == "wrote\n"
    assert ["'overlay' is not possible" in told["notices"][0], "'tmpfs' is not possible" in told["notices"][1]] == [
        True
    ] * 2
    assert "set to 'no' by administrator" in told["notices"][0]


def test_without_user_namespaces_the_error_says_whom_to_ask(cluster: Cluster) -> None:
    """A tree of processes in which no further user namespace can be made."""
    code = PRELUDE + "tell(error=error_of(ApptainerWorkspace(image=TINY, use_fakeroot=False).start))"
    inner = (
        "echo 0 > /proc/sys/user/max_user_namespaces; "
        f'exec setpriv --reuid=tester --regid=tester --clear-groups env HOME=/home/tester {VENV}/python -c "$1"'
    )
    whole = "0,0,4294967295"
    argv = ["unshare", "-U", f"--map-users={whole}", f"--map-groups={whole}", "-m", "sh", "-c", inner, "sh", code]
    ended = cluster.run(NODE, argv, user="root")
    assert TOLD in ended.stdout, ended.stderr
    assert "ContainerError" in ended.stdout
    assert "no unprivileged user namespaces: ask its administrators" in ended.stdout


def test_a_server_that_never_answers_is_an_error_after_its_time(cluster: Cluster) -> None:
    code = """
script = Path("/tmp/runscript")
script.write_text("#!/bin/sh\\necho waiting for ever; sleep 1000\\n")
script.chmod(0o755)
w = ApptainerWorkspace(sif_file=TINY, health_check_timeout=2,
                       extra_bind_mounts=["/tmp/runscript:/.singularity.d/runscript"])
tell(error=error_of(w.start))
script.unlink()
"""
    told = cluster.tell(NODE, code)
    assert told["error"]["kind"] == "ServerNotReadyError"
    assert "did not answer within 2 s of its start" in told["error"]["text"]
    assert "waiting for ever" in told["error"]["text"]
    assert "health_check_timeout" in told["error"]["text"]
    assert cluster.leftovers([NODE]) == {}


def test_a_detached_workspace_ends_when_it_is_idle_but_not_while_a_command_runs(cluster: Cluster) -> None:
    code = """
w = ApptainerWorkspace(image=TINY, idle_timeout="2s", mount_dir=str(Path.home())).start()
w.client.post("/api/bash/start_bash_command", json={"command": "until [ -e let-go ]; do sleep 0.1; done; touch gone-on"})
directory, name = w._directory, w.id
w.detach()
import threading
pause = threading.Event()
pause.wait(5)  # longer than it may be idle
tell(still=not directory.read_record().is_final)
(Path.home() / "let-go").touch()
while not directory.read_record().is_final:
    pause.wait(0.1)
tell(reason=directory.read_record().exit_reason, gone_on=(Path.home() / "gone-on").exists())
(Path.home() / "let-go").unlink(); (Path.home() / "gone-on").unlink()
"""
    told = cluster.tell(NODE, code)
    assert told["still"] is True
    assert told["gone_on"] is True
    assert told["reason"] == "idle for 2 s"
    assert cluster.leftovers([NODE]) == {}


def test_a_job_that_does_not_start_in_time_is_cancelled(cluster: Cluster) -> None:
    code = """
slurm = SlurmOptions(partition="cpu", time="5", mem="1G", begin="now+1hour")
tell(error=error_of(ApptainerWorkspace(image=TINY, slurm=slurm, queue_timeout="3s").start),
     queue=subprocess.run(["squeue", "-h", "--me"], capture_output=True, text=True).stdout)
"""
    told = cluster.tell("login", code)
    assert told["error"]["kind"] == "QueueTimeoutError"
    assert "was still in the queue after 3 s" in told["error"]["text"]
    assert "PENDING, its begin time has not come (BeginTime)" in told["error"]["text"]
    assert told["queue"] == ""


def test_slurm_auto_takes_slurm_where_there_is_sbatch_and_this_machine_where_not(cluster: Cluster) -> None:
    code = """
said = []
def run():
    w = ApptainerWorkspace(image=TINY, slurm="auto")
    w.on_progress = said.append
    with w:
        return w.job
on_slurm = run()
import tempfile
with tempfile.TemporaryDirectory() as few:
    for name in ("apptainer", "fusermount3"):
        os.symlink(f"/usr/bin/{name}", f"{few}/{name}")
    os.environ["PATH"] = few
    here = run()
tell(on_slurm=on_slurm, here=here, said=said)
"""
    told = cluster.tell(NODE, code)
    assert told["on_slurm"].isdigit()
    assert told["here"] is None
    assert "slurm='auto': using Slurm" in told["said"]
    assert "slurm='auto': there is no sbatch on PATH, using this machine" in told["said"]
