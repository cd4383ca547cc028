"""`hpc-workspace doctor` on the real cluster: what it says of a good one, and of each fault, made for real on n03."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from hpc_workspace.connect import ladder
from hpc_workspace.doctor import reach
from hpc_workspace.doctor.checks import MACHINE, SITE
from tests.integration.cluster import VENV, Cluster
from tests.integration.test_layers import LATE, LAYER, layer  # noqa: F401 - a fixture

pytestmark = pytest.mark.cluster

NODE = ("--node", "--nodelist", "n03")
# Of the cluster itself: its nodes have no network.
OFFLINE = {"dns"}
# In a root directory that is not its mount namespace's, a process is refused user namespaces; user_namespaces(7), EPERM.
CHROOT = 'mkdir -p /mnt/root && mount --rbind / /mnt/root && exec chroot /mnt/root "$@"'
AS_TESTER = ("setpriv", "--reuid=2001", "--regid=2001", "--init-groups", "--")
# As in a job: workspaces run here.
IN_JOB = {"SLURM_JOB_ID": "1", "HOME": "/home/tester", "USER": "tester"}

Found = dict[str, dict[str, Any]]


def doctor(cluster: Cluster, *arguments: str, env: Mapping[str, str] | None = None) -> Found:
    """What a doctor on the login node finds, by check; a node's has `@` after it."""
    pairs = [f"{name}={value}" for name, value in (env or {}).items()]
    ended = cluster.run("login", ["env", *pairs, f"{VENV}/hpc-workspace", "doctor", "--json", *arguments])
    return parse(ended.stdout, ended.returncode, ended.stderr)


def doctor_under(cluster: Cluster, script: str, **env: str) -> Found:
    """What a doctor finds on n03, in a mount namespace of its own in which root ran `script`, which ends in "$@"."""
    pairs = [f"{name}={value}" for name, value in (IN_JOB | env).items()]
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *AS_TESTER, "env", *pairs]
    ended = cluster.run("n03", [*command, f"{VENV}/hpc-workspace", "doctor", "--json"], user="root")
    return parse(ended.stdout, ended.returncode, ended.stderr)


def parse(stdout: str, code: int, stderr: str) -> Found:
    assert code in (0, 1), stderr
    findings = json.loads(stdout)["findings"]
    assert not [finding for finding in findings if "the check itself broke" in finding["found"]]
    assert code == int(any(finding["level"] == "fail" for finding in findings)), stdout
    return {finding["name"] + ("@" if finding["node"] else ""): finding for finding in findings}


def not_ok(found: Found) -> set[str]:
    return {name for name, finding in found.items() if finding["level"] != "ok"}


@contextlib.contextmanager
def changed(cluster: Cluster, do: str, undo: str, node: str = "n03") -> Iterator[None]:
    """Something of a node as root made it, until the end."""
    made = cluster.run(node, ["sh", "-ec", do], user="root")
    try:
        assert made.returncode == 0, made.stderr
        yield
    finally:
        undone = cluster.run(node, ["sh", "-ec", undo], user="root")
        assert undone.returncode == 0, undone.stderr


@contextlib.contextmanager
def stopped(cluster: Cluster, node: str, daemon: str) -> Iterator[None]:
    cluster.call("daemon", "stop", node, daemon)
    try:
        yield
    finally:
        cluster.call("daemon", "start", node, daemon)


def restart(cluster: Cluster, node: str, daemon: str) -> None:
    with stopped(cluster, node, daemon):
        pass


def test_a_good_cluster_is_good_and_nothing_is_left(cluster: Cluster) -> None:
    found = doctor(cluster, *NODE)
    assert not_ok(found) <= OFFLINE, json.dumps({name: found[name] for name in not_ok(found)}, indent=1)
    assert {check.name for check in (*MACHINE, *SITE)} - set(found) <= {"internet", "accounts"}
    assert {f"{check.name}@" for check in MACHINE} - set(found) <= {"internet@"}
    assert {f"{look.name}@" for look in reach.LOOKS} <= set(found)
    for name in ladder._RUNGS:
        shown = found[f"{reach.ROUTE.format(name)}@"]["found"]
        if name == "loopback":
            assert shown == "not from here: n03 is another machine"
        else:
            assert re.match(r"connected in \d+ ms, a request takes [\d.]+ ms$", shown), shown
    assert re.match(r"apptainer version 1\.\d+", found["runtime@"]["found"])
    assert found["overlay@"]["found"] == "the kernel's, writable"
    assert found["fakeroot@"]["found"] == "root inside, with 65537 ids"
    assert found["cgroups@"]["found"].startswith("v1, memory controller, at most")
    assert "a job would start at 20" in found["submit"]["found"]
    assert cluster.leftovers() == {}


def test_the_node_by_hand_is_as_good(cluster: Cluster) -> None:
    ended = cluster.run("login", ["srun", "--quiet", "-w", "n03", f"{VENV}/hpc-workspace", "doctor", "--json"])
    found = parse(ended.stdout, ended.returncode, ended.stderr)
    assert not_ok(found) <= OFFLINE
    assert "container" in found


def test_a_node_without_apptainer(cluster: Cluster) -> None:
    with changed(
        cluster, "mv /usr/bin/apptainer /usr/bin/apptainer.away", "mv /usr/bin/apptainer.away /usr/bin/apptainer"
    ):
        found = doctor(cluster, *NODE)
    assert found["runtime@"]["level"] == "fail"
    assert "module load" in found["runtime@"]["remedy"]
    assert found["runtime"]["level"] == "ok"
    assert "container@" not in found


def test_a_user_without_subordinate_ids(cluster: Cluster) -> None:
    with changed(
        cluster,
        "cd /etc; for f in subuid subgid; do cp -p $f $f.away; sed -i /^tester:/d $f; done",
        "cd /etc; for f in subuid subgid; do mv $f.away $f; done",
    ):
        found = doctor(cluster, *NODE)
    assert found["subordinate ids@"]["level"] == "warn"
    assert "no line for tester in /etc/subuid and /etc/subgid" in found["subordinate ids@"]["found"]
    assert "usermod --add-subuids" in found["subordinate ids@"]["remedy"]
    assert found["subordinate ids"]["level"] == "ok"


def test_a_machine_without_user_namespaces(cluster: Cluster) -> None:
    found = doctor_under(cluster, CHROOT)
    assert found["user namespaces"]["level"] == "fail"
    assert "Operation not permitted" in found["user namespaces"]["found"]
    assert found["container"]["level"] == "fail"
    assert "namespace" in found["container"]["remedy"]


def test_a_user_whose_limit_of_user_namespaces_is_none(cluster: Cluster) -> None:
    """The limit of a user namespace's own, so that the other nodes, which share the machine's, keep theirs."""
    drop = "setpriv --inh-caps=-all --ambient-caps=-all"
    script = f'echo 0 > /proc/sys/user/max_user_namespaces && exec {drop} "$@"'
    pairs = [f"{name}={value}" for name, value in IN_JOB.items()]
    under = ["env", *pairs, "unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", script, "sh"]
    ended = cluster.run("n03", [*under, f"{VENV}/hpc-workspace", "doctor", "--json"])
    found = parse(ended.stdout, ended.returncode, ended.stderr)
    assert found["user namespaces"]["found"].endswith("user.max_user_namespaces = 0")
    assert found["container"]["level"] == "fail"
    assert found["container"]["remedy"].startswith("This node allows no unprivileged user namespaces")


def test_a_dev_fuse_that_is_shut(cluster: Cluster) -> None:
    with changed(cluster, "chmod 600 /dev/fuse", "chmod 666 /dev/fuse"):
        found = doctor(cluster, *NODE)
    assert found["/dev/fuse@"]["level"] == "fail"
    assert found["/dev/fuse@"]["found"] == "/dev/fuse: Permission denied"
    assert found["sif@"]["level"] == "fail"
    assert found["sif@"]["remedy"].startswith("This node's /dev/fuse is shut to you")
    assert found["/dev/fuse"]["level"] == "ok"


def test_a_node_without_squashfuse(cluster: Cluster) -> None:
    with changed(
        cluster,
        "cd /usr/bin; for f in squashfuse squashfuse_ll; do mv $f $f.away; done",
        "cd /usr/bin; for f in squashfuse squashfuse_ll; do mv $f.away $f; done",
    ):
        found = doctor(cluster, *NODE)
    assert found["fuse programs@"]["level"] == "warn"
    assert found["fuse programs@"]["found"].startswith("no squashfuse; ")
    assert found["sif@"]["level"] == "warn"
    assert found["sif@"]["found"] == "runs, but is unpacked at each start"


def test_a_state_directory_on_a_disk_of_the_login_nodes_own(cluster: Cluster) -> None:
    found = doctor(cluster, *NODE, env={"HPC_WORKSPACE_HOME": "/tmp/of-login"})
    assert found["shared directory@"]["level"] == "fail"
    assert "HPC_WORKSPACE_HOME" in found["shared directory@"]["remedy"]
    assert found["routes@"]["level"] == "fail"
    assert found["scratch@"]["level"] == "ok"


@pytest.mark.usefixtures("layer")
@pytest.mark.parametrize(
    ("how", "here", "between"),
    [
        ("ENOSYS", "there are no locks (ENOSYS)", "no locks between nodes (ENOSYS)"),
        ("ENOLCK", "there are no locks (ENOLCK)", "no locks between nodes (ENOLCK)"),
        ("LIES", "two processes hold one lock at the same time", "n03 holds a lock that is held here"),
    ],
)
def test_locks_that_fail_or_lie_on_the_node(cluster: Cluster, how: str, here: str, between: str) -> None:
    found = doctor(cluster, *NODE, env={"HPC_WORKSPACE_SLURM_SETUP": f"export LD_PRELOAD={LAYER} LAYER_FLOCK={how}"})
    assert found["locks"]["level"] == "ok"
    assert found["locks@"]["level"] == "warn"
    assert here in found["locks@"]["found"]
    assert between in found["locks between nodes@"]["found"]
    assert found["shared directory@"]["level"] == "ok"


@pytest.mark.usefixtures("layer")
@pytest.mark.parametrize(("off", "side"), [("600", "ahead of"), ("-600", "behind")])
def test_a_node_whose_clock_is_ten_minutes_off(cluster: Cluster, off: str, side: str) -> None:
    env = {"HPC_WORKSPACE_SLURM_SETUP": f"export LD_PRELOAD={LAYER} LAYER_CLOCK_S={off}"}
    found = doctor(cluster, *NODE, env=env)
    assert found["clock@"]["level"] == "warn"
    assert found["clock@"]["found"] == f"600 s {side} the file server's clock"
    other = "behind" if side == "ahead of" else "ahead of"
    assert re.match(rf"(599|600) s {other} n03's clock$", found["clocks@"]["found"])
    assert found["clock"]["level"] == "ok"


@pytest.mark.usefixtures("layer")
def test_files_that_appear_late_are_seen_all_the_same(cluster: Cluster) -> None:
    setup = f"export LD_PRELOAD={LAYER} " + " ".join(f"{name}={value}" for name, value in LATE.items())
    found = doctor(cluster, *NODE, env={"HPC_WORKSPACE_SLURM_SETUP": setup, "LD_PRELOAD": LAYER, **LATE})
    assert found["shared directory@"]["level"] == "ok"
    assert not_ok(found) <= OFFLINE


def test_a_controller_that_is_silent(cluster: Cluster) -> None:
    with stopped(cluster, "login", "slurmctld"):
        found = doctor(cluster)
    assert found["slurm controller"]["level"] == "fail"
    assert "scontrol ping" in found["slurm controller"]["remedy"]
    assert not {"submit", "partitions", "job limits"} & set(found)


def test_a_munge_that_is_silent(cluster: Cluster) -> None:
    with stopped(cluster, "login", "munged"):
        found = doctor(cluster)
    assert found["slurm controller"]["level"] == "fail"
    assert re.search("munge|auth", found["slurm controller"]["found"], re.IGNORECASE)


def test_a_node_whose_munge_is_silent(cluster: Cluster) -> None:
    try:
        with stopped(cluster, "n03", "munged"):
            found = doctor(cluster, *NODE, "--queue-timeout", "30s")
    finally:
        again = cluster.run("login", ["srun", "--nodelist=n03", "true"])  # until Slurm has the node again
        assert again.returncode == 0, again.stderr
    assert found["node job"]["level"] == "fail"
    # By the moment: Slurm may have noticed before it gives the node a job.
    assert re.search("Zero Bytes were transmitted|n03: [a-z]+\\* ", found["node job"]["found"])
    assert "munge" in found["node job"]["remedy"]


def test_a_node_without_sshd(cluster: Cluster) -> None:
    with stopped(cluster, "n03", "sshd"):
        found = doctor(cluster, *NODE)
    for name in ("paramiko", "openssh"):
        assert found[f"route {name}@"]["level"] == "warn"
    assert found["route srun@"]["level"] == "ok"
    assert "Until then srun is used." in found["route paramiko@"]["remedy"]


def test_a_node_whose_sshd_forwards_nothing(cluster: Cluster) -> None:
    file = "/etc/ssh/sshd_config.d/cluster.conf"
    try:
        with changed(
            cluster, f"cp -p {file} {file}.away; echo AllowTcpForwarding no >> {file}", f"mv {file}.away {file}"
        ):
            restart(cluster, "n03", "sshd")
            found = doctor(cluster, *NODE)
    finally:
        restart(cluster, "n03", "sshd")
    for name in ("paramiko", "openssh"):
        assert found[f"route {name}@"]["level"] == "warn"
    assert [name for name in found if name.startswith("route ") and "connected in" in found[name]["found"]]


def test_scratch_that_is_full(cluster: Cluster) -> None:
    found = doctor_under(cluster, 'mount -t tmpfs -o size=200k,mode=1777 none /tmp && exec "$@"')
    assert found["scratch"]["level"] == "fail"
    assert "No space left on device" in found["scratch"]["found"]
    assert "TMPDIR" in found["scratch"]["remedy"]


def test_a_registry_that_the_node_reaches(cluster: Cluster) -> None:
    found = doctor(cluster, *NODE, env={"HPC_WORKSPACE_IMAGES_PLAIN_HTTP": "login:5000"})
    assert found["internet"]["level"] == "ok"
    assert found["internet@"]["level"] == "ok"
    assert "login:5000 answers" in found["internet@"]["found"]
    assert not_ok(found) == set()
