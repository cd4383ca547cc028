"""The routes through one command on the node, on the real cluster: what they carry, and what is left of them."""

from __future__ import annotations

import json

import pytest

from tests.integration.cluster import TOLD, Cluster

pytestmark = pytest.mark.cluster

NODE = "n02"
BY = pytest.mark.parametrize("route", ["srun", "ssh-command"])
# A carrier is what runs on this side, a bridge what runs on the node.
MAKE = f"""
import hashlib, threading
from concurrent.futures import ThreadPoolExecutor
def make(route, **slurm):
    known = {{"partition": "cpu", "time": "00:10:00", "mem": "500M", "nodelist": {NODE!r}}} | slurm
    return ApptainerWorkspace(runtime="process", connect=route, slurm=SlurmOptions(**known))
def shared(w):
    return w._link._route._shared
def steps():
    asked = subprocess.run(["squeue", "--me", "--steps", "--noheader", "--format=%i"], capture_output=True, text=True)
    return [step for step in asked.stdout.split() if not step.endswith((".batch", ".extern"))]
def wait(is_done, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not (done := is_done()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done
"""
# What ends on a node is told to nobody on another.
NO_BRIDGE = (
    'for i in $(seq 100); do left="$(pgrep -u tester -af node.bridge)"; [ -z "$left" ] && exit 0; sleep 0.1; done; '
    'echo "$left"'
)


def bridges_left(cluster: Cluster) -> str:
    return cluster.run(NODE, ["sh", "-c", NO_BRIDGE], user="root").stdout


@BY
def test_it_carries_commands_and_files_byte_for_byte(cluster: Cluster, route: str) -> None:
    told = cluster.tell(
        "login",
        MAKE
        + f"""
def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
with make({route!r}) as w:
    tell(route=w._link._route.name, name=w.execute_command("hostname").stdout.strip())
    up, down = Path("/tmp/routes-up"), Path("/tmp/routes-down")
    block = os.urandom(1 << 20)
    with up.open("wb") as file:
        for number in range(256):
            file.write(block[number:] + block[:number])
    w.file_upload(up, "routes.bin")
    tell(there=w.execute_command("sha256sum routes.bin", timeout=60).stdout.split()[0])
    w.file_download("routes.bin", down)
    tell(up=digest(up), down=digest(down))
    up.unlink(), down.unlink()
    with ThreadPoolExecutor(20) as pool:
        ran = pool.map(lambda n: w.execute_command(f"sleep 0.3; echo {{n}}; seq 20000").stdout, range(20))
        tell(right=[out == f"{{n}}\\n" + "".join(f"{{i}}\\n" for i in range(1, 20001)) for n, out in enumerate(ran)])
""",
        timeout_s=300,
    )
    assert told["route"] == route
    assert told["name"] == NODE
    assert told["there"] == told["up"] == told["down"]
    assert told["right"] == [True] * 20
    assert bridges_left(cluster) == ""
    assert cluster.leftovers([NODE]) == {}


@BY
def test_a_bridge_that_is_killed_is_made_anew_and_the_command_that_it_carried_goes_on(
    cluster: Cluster, route: str
) -> None:
    told = cluster.tell(
        "login",
        MAKE
        + f"""
with make({route!r}) as w:
    w.execute_command("true")
    first = shared(w).carrier
    running = ThreadPoolExecutor(1).submit(w.execute_command, "sleep 3.21; echo done", timeout=60)
    assert wait(lambda: w.execute_command("pgrep -xf 'sleep 3.21'").stdout)
    if {route!r} == "srun":
        subprocess.run(["scancel", *steps()], check=True)
    else:
        subprocess.run(["ssh", {NODE!r}, "pkill -9 -f node.bridg[e]"])
"""
        + """
    tell(cut_off=running.result(20).stdout, out=w.execute_command("echo again").stdout, is_another=shared(w).carrier is not first, steps=len(steps()))
""",
    )
    assert told["cut_off"] == "done\n"
    assert told["out"] == "again\n"
    assert told["is_another"] is True
    assert told["steps"] == (1 if route == "srun" else 0)
    assert bridges_left(cluster) == ""
    assert cluster.leftovers([NODE]) == {}


@BY
def test_nothing_is_left_of_a_client_that_is_killed(cluster: Cluster, route: str) -> None:
    client = cluster.python(
        "login",
        f"""
import json, os, signal
from hpc_workspace import ApptainerWorkspace, SlurmOptions
w = ApptainerWorkspace(runtime="process", connect={route!r},
    slurm=SlurmOptions(partition="cpu", time="00:10:00", mem="500M", nodelist={NODE!r})).start()
w.execute_command("true")
print({TOLD!r} + json.dumps(w.id), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    workspace_id = json.loads(client.stdout.partition(TOLD)[2])
    assert bridges_left(cluster) == ""
    told = cluster.tell(
        "login",
        MAKE
        + f"""
tell(steps=wait(lambda: not steps()))
w = Workspace.attach({workspace_id!r}, connect={route!r})
tell(out=w.execute_command("echo alive").stdout)
w.close()
""",
    )
    assert told["steps"] is True
    assert told["out"] == "alive\n"
    assert cluster.leftovers([NODE]) == {}


def test_two_jobs_on_a_node_share_one_step_and_the_second_outlives_the_first(cluster: Cluster) -> None:
    told = cluster.tell(
        "login",
        MAKE
        + """
first = make("srun").start()
second = make("srun").start()
tell(outs=[w.execute_command("hostname").stdout.strip() for w in (first, second)])
tell(jobs=[first.job, second.job], steps=steps(), same=shared(first) is shared(second))
first.close()
tell(out=second.execute_command("echo mine").stdout, then=wait(lambda: steps() == [f"{second.job}.0"]))
second.close()
""",
    )
    assert told["outs"] == [NODE, NODE]
    assert told["same"] is True
    assert told["steps"] == [f"{told['jobs'][0]}.0"]
    assert told["out"] == "mine\n"
    assert told["then"] is True
    assert bridges_left(cluster) == ""
    assert cluster.leftovers([NODE]) == {}


def test_a_step_starts_in_a_job_whose_batch_script_has_all_of_the_node(cluster: Cluster) -> None:
    told = cluster.tell(
        "login",
        MAKE
        + """
with make("srun", mem="0", exclusive=True) as w:
    tell(out=w.execute_command("echo in").stdout, steps=steps())
""",
    )
    assert told["out"] == "in\n"
    assert len(told["steps"]) == 1
    assert cluster.leftovers([NODE]) == {}


def test_a_step_does_not_delay_the_end_of_its_job(cluster: Cluster) -> None:
    told = cluster.tell(
        "login",
        MAKE
        + """
def gone_s(route):
    w = make(route).start()
    w.execute_command("true")
    job, began_s = w.job, time.monotonic()
    subprocess.run(["scancel", job], check=True)
    states = lambda: subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True).stdout
    assert wait(lambda: not states(), 40)
    took_s = time.monotonic() - began_s
    error_of(w.close)
    return took_s
tell(with_step=gone_s("srun"), without=gone_s("paramiko"))
""",
    )
    assert told["with_step"] < told["without"] + 2
    assert cluster.leftovers([NODE]) == {}
