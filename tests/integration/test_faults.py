"""What happens to a workspace in a job when something fails, each made for real; docs/cluster.md has them in a table."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.cluster import PRELUDE, TINY, TOLD, VENV, Cluster

pytestmark = pytest.mark.cluster

# A client that tells of its workspace, then reads what to do from its stdin, a line of Python at a time.
CLIENT = (
    PRELUDE
    + """
options = json.loads(sys.argv[1])
slurm = SlurmOptions(**dict(dict(partition="cpu", time="10", mem="500M"), **options.pop("slurm", {})))
said = []
import logging
logging.basicConfig(level=logging.WARNING)
w = ApptainerWorkspace(**({"image": TINY} | options), slurm=slurm)
w.on_progress = said.append
w.start()
tell(id=w.id, node=w.node, job=w.job)
for line in sys.stdin:
    exec(line)
"""
)


class Client:
    """A client process on the login node, with a workspace in a job."""

    def __init__(self, cluster: Cluster, **options: Any) -> None:
        self.cluster = cluster
        self._process = cluster.open("login", [f"{VENV}/python", "-c", CLIENT, json.dumps(options)])
        self.told: dict[str, Any] = {}
        self.hear("job")
        self.node, self.job = self.told["node"], self.told["job"]

    def hear(self, name: str) -> Any:
        """The value of `name`, as soon as the client tells it."""
        assert self._process.stdout is not None
        while name not in self.told:
            line = self._process.stdout.readline()
            if not line:
                assert self._process.stderr is not None
                pytest.fail(f"the client is gone: {self._process.stderr.read()}")
            if line.startswith(TOLD):
                self.told |= json.loads(line.removeprefix(TOLD))
        return self.told[name]

    def do(self, code: str) -> None:
        """Have the client run a line of Python; it goes on by itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(code.replace("\n", "; ") + "\n")
        self._process.stdin.flush()

    def leave(self) -> str:
        """Let the client come to its end, in peace. Returns what it had to say on stderr."""
        _, said = self._process.communicate(timeout=120)
        assert self._process.returncode == 0, said
        return said

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def clients(cluster: Cluster) -> Iterator[Any]:
    """Makes clients; those that a failed test leaves are ended, and their jobs."""
    made: list[Client] = []

    def make(**options: Any) -> Client:
        made.append(Client(cluster, **options))
        return made[-1]

    yield make
    for client in made:
        client.kill()
        cluster.run("login", ["scancel", "--quiet", client.job])


LONG = "tell(error=error_of(lambda: w.execute_command('echo begun > /workspace/x; sleep 600', timeout=700)))"


def begun(client: Client) -> None:
    """Wait until the client's long command runs."""
    client.cluster.run(
        client.node, ["sh", "-c", "until ls /tmp/hpcws-*/workspace/x >/dev/null 2>&1; do sleep 0.1; done"], user="root"
    )


def test_a_job_that_is_cancelled_under_a_running_command(cluster: Cluster, clients: Any) -> None:
    client = clients()
    client.do(LONG)
    begun(client)
    cluster.run("login", ["scancel", client.job], user="root")
    error = client.hear("error")
    assert error["kind"] == "JobEndedError"
    assert f"Slurm job {client.job} on {client.node} was cancelled" in error["text"]
    assert "(CANCELLED) under its workspace" in error["text"]
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


@pytest.mark.long
def test_a_job_that_runs_into_its_time_limit(cluster: Cluster, clients: Any) -> None:
    client = clients(slurm={"time": "1"})
    # With a limit of a minute, Slurm's warning of two minutes before comes at once.
    client.do("exec('while not any(\"time limit is near\" in n for n in w.notices): time.sleep(0.1)')")
    client.do("tell(left=w.time_left_s)")
    assert 0 < client.hear("left") <= 60
    client.do(LONG)
    error = client.hear("error")
    assert error["kind"] == "JobEndedError"
    assert "ran into its time limit (TIMEOUT) under its workspace" in error["text"]
    assert "the job's time limit" in error["text"]  # its own log, in the evidence
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


def test_a_command_that_takes_more_memory_than_the_job_has(cluster: Cluster, clients: Any) -> None:
    client = clients(slurm={"mem": "300M"})
    client.do(
        "r = w.execute_command(\"python3 -c 'x = bytearray(2_000_000_000)'\", timeout=60); tell(code=r.exit_code)"
    )
    assert client.hear("code") in (-9, 137)
    client.do("tell(after=w.execute_command('echo alive').stdout)")
    assert client.hear("after") == "alive\n"
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


def test_a_node_that_loses_its_power(cluster: Cluster, clients: Any) -> None:
    client = clients(slurm={"nodelist": "n03"})
    client.do(LONG)
    begun(client)
    cluster.call("power-cut", "n03")
    try:
        error = client.hear("error")
        assert error["kind"] == "JobEndedError"
        assert re.search(r"on n03 was lost when its node failed \(NODE_FAIL\)", error["text"])
        client.do("w.close()")
        client.leave()
    finally:
        cluster.power_on("n03")
    # Nothing could clear up: the scratch is on the node's disk, until the next start there or this.
    reaped = cluster.run("n03", [f"{VENV}/hpc-workspace", "reap"])
    assert "removed" in reaped.stdout, reaped.stdout + reaped.stderr
    assert cluster.leftovers() == {}


def test_a_controller_that_is_silent_for_a_minute_is_no_end_of_anything(cluster: Cluster, clients: Any) -> None:
    client = clients()
    cluster.call("daemon", "stop", "login", "slurmctld")
    try:
        client.do(
            "began = time.monotonic()\ncount = 0\n"
            "exec('while time.monotonic() - began < 65: count += w.execute_command(\"sleep 1\").exit_code == 0')\n"
            "tell(count=count)"
        )
        assert client.hear("count") > 30
    finally:
        cluster.call("daemon", "start", "login", "slurmctld")
    client.do("tell(after=w.execute_command('echo alive').stdout)")
    assert client.hear("after") == "alive\n"
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


@pytest.mark.long
def test_closing_while_the_controller_is_silent_ends_it_through_the_door(cluster: Cluster, clients: Any) -> None:
    client = clients()
    cluster.call("daemon", "stop", "login", "slurmctld")
    try:
        client.do("tell(closed=error_of(w.close))")
        closed = client.hear("closed")
        still = cluster.session(client.node, client.told["id"])
    finally:
        cluster.call("daemon", "start", "login", "slurmctld")
    assert still == {}
    assert closed is None or client.job in closed["text"]
    client.leave()
    cluster.run("login", ["sh", "-c", f"while squeue -h -j {client.job} -t R,CG | grep -q .; do sleep 0.2; done"])
    assert cluster.leftovers() == {}


def test_a_silent_controller_at_the_start_is_named_and_nothing_is_queued(cluster: Cluster) -> None:
    cluster.call("daemon", "stop", "login", "slurmctld")
    try:
        code = "tell(error=error_of(ApptainerWorkspace(image=TINY, slurm=SLURM).start))"
        error = cluster.tell("login", code)["error"]
    finally:
        cluster.call("daemon", "start", "login", "slurmctld")
    assert error["kind"] == "SchedulerUnavailableError"
    assert "may or may not have been queued" in error["text"]
    assert "squeue --me --name=hpcws-ws-" in error["text"]
    assert cluster.run("login", ["squeue", "--noheader", "--user=tester"]).stdout == ""


def test_a_job_whose_sbatch_never_answered_is_found_by_its_name(cluster: Cluster) -> None:
    """With an sbatch of the site's own that queues the job and then hangs."""
    wrapper = '#!/bin/sh\n/usr/bin/sbatch "$@" > /dev/null\nexec sleep 1000\n'
    cluster.run(
        "login", ["sh", "-c", "mkdir -p ~/slow && cat > ~/slow/sbatch && chmod 755 ~/slow/sbatch"], stdin=wrapper
    )
    code = """
os.environ["PATH"] = f"{Path.home()}/slow:{os.environ['PATH']}"
with ApptainerWorkspace(image=TINY, slurm=SLURM) as w:
    tell(output=w.execute_command("echo found").stdout, job=w.job)
"""
    told = cluster.tell("login", code)
    assert told["output"] == "found\n"
    assert told["job"].isdigit()
    cluster.run("login", ["sh", "-c", "rm -r ~/slow; pkill -u tester -x sleep"])
    assert cluster.leftovers() == {}


def test_a_job_that_can_never_start_says_so_while_it_waits(cluster: Cluster) -> None:
    code = """
said = []
w = ApptainerWorkspace(image=TINY, queue_timeout=4, slurm=SlurmOptions(partition="cpu", extra={"hold": None}))
w.on_progress = said.append
tell(error=error_of(w.start), said=said)
"""
    told = cluster.tell("login", code)
    assert told["error"]["kind"] == "QueueTimeoutError"
    assert any("it is held (JobHeldUser). Waiting does not help: scontrol release" in line for line in told["said"])
    assert cluster.run("login", ["squeue", "--noheader", "--user=tester"]).stdout == ""


def test_a_job_that_waits_says_why_and_when_it_is_expected_to_start(cluster: Cluster, clients: Any) -> None:
    blocker = cluster.run(
        "login", ["sbatch", "--parsable", "-p", "cpu", "-N3", "--exclusive", "-t", "2", "--wrap", "sleep 600"]
    ).stdout.strip()
    try:
        code = """
said = []
w = ApptainerWorkspace(image=TINY, queue_timeout=25, slurm=SLURM)
w.on_progress = said.append
tell(error=error_of(w.start), said=said)
"""
        told = cluster.tell("login", code)
    finally:
        cluster.run("login", ["scancel", blocker])
    assert told["error"]["kind"] == "QueueTimeoutError"
    waits = [line for line in told["said"] if "waits for free resources (Resources)" in line]
    assert waits
    assert any("Slurm expects it to start at 20" in line for line in waits)


def test_a_workspace_that_somebody_else_closed_is_left_in_peace(cluster: Cluster, clients: Any) -> None:
    client = clients()
    down = cluster.run("login", [f"{VENV}/hpc-workspace", "down", client.told["id"]])
    assert down.returncode == 0, down.stderr
    client.do("tell(error=error_of(lambda: w.execute_command('true')), alive=w.alive)")
    error = client.hear("error")
    assert error["kind"] == "ContainerError"
    assert "has ended: somebody else closed it" in error["text"]
    assert client.hear("alive") is False
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "SIGINT", "exception", "exit"])
def test_the_job_never_outlives_what_the_user_asked_for(cluster: Cluster, how: str) -> None:
    ends = {
        "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
        "SIGHUP": "os.kill(os.getpid(), signal.SIGHUP); time.sleep(60)",
        "SIGINT": "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
        "exception": "raise RuntimeError('of the user')",
        "exit": "w.__enter__(); sys.exit(0)",
    }
    code = f"""
w = ApptainerWorkspace(image={TINY!r}, slurm=SLURM)
def use():
    {"with w:" if how != "exit" else "w.start()"}
    {"    " if how != "exit" else ""}print("job", w.job, flush=True)
    {"    " if how != "exit" else ""}{ends[how]}
use()
"""
    ended = subprocess.run(
        cluster.argv("login", [f"{VENV}/python", "-c", PRELUDE + code]), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert "job " in ended.stdout, ended.stderr
    assert cluster.leftovers() == {}
