"""A job that Slurm requeues: its workspace's next life, and who is told of it. The requeues are Slurm's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.cluster import VENV, Cluster
from tests.integration.test_faults import Client, begun

pytestmark = pytest.mark.cluster

RUN = "tell({name}=error_of(lambda: w.execute_command({command!r}, timeout=700)))"


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    made = Client(cluster, slurm={"partition": "low", "requeue": True}, mount_dir="/home/tester/kept")
    yield made
    made.kill()
    cluster.run("login", ["scancel", "--quiet", made.job])


@pytest.fixture(autouse=True)
def kept(cluster: Cluster) -> Iterator[None]:
    """The directory that is at /workspace: what outlives a restart."""
    cluster.run("login", ["sh", "-c", "rm -rf ~/kept && mkdir -p ~/kept"])
    yield
    cluster.run("login", ["sh", "-c", "rm -rf ~/kept"])


def requeue(client: Client) -> None:
    """Have Slurm requeue the job, and start it again without the two minutes that it puts between two lives."""
    client.cluster.run("login", ["scontrol", "requeue", client.job], user="root")
    start_again(client)


def start_again(client: Client) -> None:
    # Not at once: the node knows the credential of the new life from that of the old one by its second alone.
    waits = f"until squeue -h -j {client.job} -t PD | grep -q .; do sleep 0.1; done"
    client.cluster.run(
        "login", ["sh", "-c", f"{waits}; scontrol update JobId={client.job} StartTime=now+3"], user="root"
    )


def has_begun(client: Client) -> None:
    client.cluster.run("login", ["sh", "-c", "until [ -e ~/kept/begun ]; do sleep 0.1; done"])


LONG = RUN.format(name="long", command="touch /workspace/begun /var/lost; sleep 600")
IS_HEALTHY = """
def is_healthy():
    try:
        return httpx.get(url + "/health", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False
"""
WHERE = "ls /var/lost; ls /workspace; echo $HOSTNAME; hostname"


def test_a_job_that_is_requeued_under_a_running_command(cluster: Cluster, client: Client) -> None:
    client.do(LONG)
    has_begun(client)
    requeue(client)
    told = client.hear("long")
    assert told["kind"] == "SandboxRestarted", told
    assert f"Slurm requeued job {client.job}: workspace {client.told['id']} runs anew on n0" in told["text"]
    assert "(restart 1)" in told["text"]
    assert "what is under mount_dir /home/tester/kept was kept" in told["text"]
    client.do(
        f"r = w.execute_command({WHERE!r}); tell(out=r.stdout, err=r.stderr, node=w.node, job=w.job, alive=w.alive)"
    )
    lines = client.hear("out").split()
    assert lines[0] == "begun"
    assert "lost" in client.told["err"]
    assert (client.told["job"], client.told["alive"]) == (client.job, True)
    client.do("w.close()")
    said = client.leave()
    assert "Traceback" not in said
    assert cluster.run("login", ["squeue", "--noheader", "--user=tester"]).stdout == ""
    assert cluster.leftovers() == {}


def test_the_first_call_after_a_restart_is_told_once_and_other_peoples_clients_find_the_new_life(
    cluster: Cluster, client: Client
) -> None:
    client.do("import httpx; url = w.host; tell(before=httpx.get(url + '/health').status_code)")
    assert client.hear("before") == 200
    requeue(client)
    client.do(f"exec({IS_HEALTHY!r})")
    client.do("exec('while not is_healthy(): time.sleep(0.1)'); tell(other=200, key=w.api_key)")
    assert client.hear("other") == 200
    client.do(RUN.format(name="first", command="true"))
    assert client.hear("first")["kind"] == "SandboxRestarted"
    client.do("tell(second=w.execute_command('echo on').stdout, same=httpx.get(url + '/health').status_code)")
    assert client.hear("second") == "on\n"
    assert client.hear("same") == 200
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


def test_every_call_that_a_restart_cuts_off_is_told_of_it(cluster: Cluster, client: Client) -> None:
    client.do(
        "from concurrent.futures import ThreadPoolExecutor; pool = ThreadPoolExecutor(8); "
        "long = 'touch /workspace/begun; sleep 600'; "
        "calls = [pool.submit(error_of, lambda: w.execute_command(long, timeout=700)) for _ in range(7)]; "
        "calls.append(pool.submit(error_of, lambda: list(w.stream_command(long, timeout=700)))); "
        "tell(kinds=[c.result()['kind'] for c in calls]); tell(after=error_of(lambda: w.execute_command('true')))"
    )
    has_begun(client)
    requeue(client)
    assert client.hear("kinds") == ["SandboxRestarted"] * 8
    assert client.hear("after") is None
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


def test_a_preempted_job_goes_on_when_the_other_one_is_done(cluster: Cluster, client: Client) -> None:
    client.do(LONG)
    has_begun(client)
    other = preempt(cluster, client.node)
    start_again(client)
    cluster.run("login", ["scancel", other])
    assert client.hear("long")["kind"] == "SandboxRestarted"
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


def preempt(cluster: Cluster, node: str) -> str:
    """A job of a higher partition that takes the whole node. Returns its id."""
    return cluster.run(
        "login", ["sbatch", "--parsable", "-p", "high", "-w", node, "--exclusive", "-t", "5", "--wrap", "sleep 300"]
    ).stdout.strip()


def test_a_preempted_job_that_may_not_be_requeued_ends(cluster: Cluster) -> None:
    client = Client(cluster, slurm={"partition": "low"})
    try:
        client.do(RUN.format(name="long", command="echo begun > /workspace/x; sleep 600"))
        begun(client)
        other = preempt(cluster, client.node)
        error = client.hear("long")
        cluster.run(
            "login", ["sh", "-c", f"scancel {other}; while squeue -h -j {other} | grep -q .; do sleep 0.1; done"]
        )
        assert error["kind"] == "JobEndedError"
        assert "was preempted by a job of higher priority (PREEMPTED) under its workspace" in error["text"]
        client.do("w.close()")
        client.leave()
    finally:
        client.kill()
    assert cluster.leftovers() == {}


def test_a_job_whose_node_dies_goes_on_elsewhere(cluster: Cluster, client: Client) -> None:
    client.do(LONG)
    has_begun(client)
    cluster.call("power-cut", client.node)
    try:
        start_again(client)
        assert client.hear("long")["kind"] == "SandboxRestarted"
        client.do("tell(now=w.node, out=w.execute_command('echo on').stdout)")
        assert client.hear("now") != client.node
        assert client.hear("out") == "on\n"
    finally:
        cluster.power_on(client.node)
    client.do("tell(after=error_of(lambda: w.execute_command('true')))")
    assert client.hear("after") is None
    client.do("w.close()")
    client.leave()
    reaped = cluster.run(client.node, [f"{VENV}/hpc-workspace", "reap"])
    assert "removed" in reaped.stdout, reaped.stdout + reaped.stderr
    assert cluster.leftovers() == {}


def test_a_job_that_is_cancelled_between_two_lives_is_at_its_end(cluster: Cluster, client: Client) -> None:
    client.do(LONG)
    has_begun(client)
    cluster.run("login", ["scontrol", "requeue", client.job], user="root")
    cluster.run("login", ["sh", "-c", f"until squeue -h -j {client.job} -t PD | grep -q .; do sleep 0.1; done"])
    cluster.run("login", ["scancel", client.job], user="root")
    error = client.hear("long")
    assert error["kind"] == "JobEndedError"
    assert "was cancelled" in error["text"]
    client.do("tell(next=error_of(lambda: w.execute_command('true')), alive=w.alive)")
    assert client.hear("next")["kind"] == "JobEndedError"
    assert client.hear("alive") is False
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


def test_a_workspace_that_is_closed_between_two_lives_leaves_nothing(cluster: Cluster, client: Client) -> None:
    client.do(
        f"import threading; waiter = threading.Thread(target=lambda: exec({LONG!r}), daemon=True); waiter.start()"
    )
    has_begun(client)
    cluster.run("login", ["scontrol", "requeue", client.job], user="root")
    cluster.run("login", ["sh", "-c", f"until squeue -h -j {client.job} -t PD | grep -q .; do sleep 0.1; done"])
    client.do("w.close(); waiter.join(20); tell(waits=waiter.is_alive(), left=w._directory.path.exists())")
    assert client.hear("waits") is False
    assert client.hear("left") is False
    assert client.hear("long")["kind"] == "ContainerError"
    client.leave()
    assert cluster.run("login", ["squeue", "--noheader", "--user=tester"]).stdout == ""
    assert cluster.leftovers() == {}


def test_a_client_that_says_nothing_holds_the_lease_of_the_new_life(cluster: Cluster, client: Client) -> None:
    client.do("from hpc_workspace.launch.watch import watch; watch._at_rest_s = 0.2; watch._changed.set()")
    requeue(client)
    client.do("exec('while w._record.restart_count == 0: time.sleep(0.05)'); tell(restarts=w._record.restart_count)")
    assert client.hear("restarts") == 1
    client.do(RUN.format(name="first", command="true"))
    assert client.hear("first")["kind"] == "SandboxRestarted"
    client.do("w.close()")
    client.leave()
    assert cluster.leftovers() == {}


def test_a_detached_workspace_is_found_again_in_its_next_life(cluster: Cluster, client: Client) -> None:
    client.do("tell(detached=w.detach())")
    client.hear("detached")
    client.leave()
    requeue(client)
    code = f"""
error = True
while error:
    error = error_of(lambda: Workspace.attach({client.told["id"]!r}).disconnect())
    time.sleep(0.1)
w = Workspace.attach({client.told["id"]!r})
tell(out=w.execute_command("echo found").stdout, restarts=w._record.restart_count)
w.close()
"""
    told = cluster.tell("login", code)
    assert (told["out"], told["restarts"]) == ("found\n", 1)
    assert cluster.leftovers() == {}
