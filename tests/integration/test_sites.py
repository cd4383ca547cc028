"""Sites differ in what they let through: `connect="auto"` finds the way that there is, or says why there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.integration.cluster import COMPUTE, Cluster

pytestmark = pytest.mark.cluster

NODE = "n01"
REACH = f"""
w = ApptainerWorkspace(runtime="process", slurm=SlurmOptions(partition="cpu", time="10", mem="500M", nodelist={NODE!r}))
error = error_of(w.start)
if error is None:
    tell(route=w._link._route.name, node=w.execute_command("read x < /proc/sys/kernel/hostname; echo $x").stdout.strip())
    w.close()
tell(error=error)
"""
# Slurm's commands less srun.
NO_SRUN = """
import os
from pathlib import Path
Path("bin").mkdir(exist_ok=True)
for name in ("sbatch", "squeue", "scancel", "sacct", "ssh"):
    Path("bin", name).unlink(missing_ok=True)
    Path("bin", name).symlink_to(f"/usr/bin/{name}")
os.environ["PATH"] = f"{Path('bin').absolute()}"
"""


@pytest.fixture(autouse=True)
def forgetful(cluster: Cluster) -> Iterator[None]:
    """No route is remembered, and ssh has no configuration of the user's own."""
    clear = ["sh", "-c", "rm -rf ~/.hpc_workspace/route-* ~/.ssh/config ~/bin"]
    cluster.run("login", clear)
    yield
    cluster.run("login", clear)


@contextlib.contextmanager
def sshd_with(cluster: Cluster, text: str) -> Iterator[None]:
    """The node's sshd with lines of configuration before all others."""
    path = "/etc/ssh/sshd_config.d/00-test.conf"
    cluster.run(NODE, ["sh", "-c", f"cat > {path}"], user="root", stdin=text)
    restart(cluster)
    try:
        yield
    finally:
        cluster.run(NODE, ["rm", path], user="root")
        restart(cluster)


def restart(cluster: Cluster) -> None:
    cluster.call("daemon", "stop", NODE, "sshd")
    cluster.call("daemon", "start", NODE, "sshd")


@contextlib.contextmanager
def sshd_away(cluster: Cluster) -> Iterator[None]:
    cluster.call("daemon", "stop", NODE, "sshd")
    try:
        yield
    finally:
        cluster.call("daemon", "start", NODE, "sshd")


@contextlib.contextmanager
def no_key(cluster: Cluster) -> Iterator[None]:
    """SSH without a password is gone: the nodes do not know the user's key any more."""
    cluster.run("login", ["sh", "-c", "mv ~/.ssh/authorized_keys ~/.ssh/away"])
    try:
        yield
    finally:
        cluster.run("login", ["sh", "-c", "mv ~/.ssh/away ~/.ssh/authorized_keys"])


def restart_slurm(cluster: Cluster) -> None:
    daemons = [*((node, "slurmd") for node in COMPUTE), ("login", "slurmctld")]
    for node, daemon in daemons:
        cluster.call("daemon", "stop", node, daemon)
    for node, daemon in reversed(daemons):
        cluster.call("daemon", "start", node, daemon)


@contextlib.contextmanager
def adopting(cluster: Cluster) -> Iterator[None]:
    """pam_slurm_adopt: who has no job on a node can't log in, and a login ends with the job that adopted it."""
    keep, mend = "cp -p {0} {0}.away; echo {1} >> {0}", "mv {0}.away {0}"
    slurm, pam = "/etc/slurm/slurm.conf", "/etc/pam.d/sshd"
    cluster.run("login", ["sh", "-c", keep.format(slurm, "PrologFlags=contain")], user="root")
    cluster.run(NODE, ["sh", "-c", keep.format(pam, "account required pam_slurm_adopt.so")], user="root")
    try:
        restart_slurm(cluster)
        yield
    finally:
        cluster.run("login", ["sh", "-c", mend.format(slurm)], user="root")
        cluster.run(NODE, ["sh", "-c", mend.format(pam)], user="root")
        restart_slurm(cluster)


@contextlib.contextmanager
def own_tmp(cluster: Cluster) -> Iterator[None]:
    """pam_namespace: a login has a /tmp of its own, in which the jobs' sockets are not."""
    script = """
    mkdir -p -m 000 /var/tmp-of && cp -p /etc/pam.d/sshd /etc/pam.d/sshd.away
    echo '/tmp /var/tmp-of/ user root' > /etc/security/namespace.conf
    echo 'session required pam_namespace.so' >> /etc/pam.d/sshd
    """
    kept = cluster.run(NODE, ["cat", "/etc/security/namespace.conf"], user="root").stdout
    cluster.run(NODE, ["sh", "-c", f"touch /tmp/of-all; {script}"], user="root")
    try:
        seen = cluster.run("login", ["ssh", "-o", "BatchMode=yes", NODE, "ls -A /tmp"])
        assert (seen.returncode, seen.stdout) == (0, ""), seen.stdout + seen.stderr
        yield
    finally:
        cluster.run(
            NODE,
            ["sh", "-c", "rm /tmp/of-all; mv /etc/pam.d/sshd.away /etc/pam.d/sshd; rm -rf /var/tmp-of"],
            user="root",
        )
        cluster.run(NODE, ["sh", "-c", "cat > /etc/security/namespace.conf"], user="root", stdin=kept)


Site = Callable[[Cluster], contextlib.AbstractContextManager[None]]
SITES: dict[str, tuple[Site, str, str]] = {
    "nothing is forbidden": (lambda c: contextlib.nullcontext(), "", "paramiko"),
    # Up to OpenSSH 9.2 that was of TCP alone, and Unix sockets went on; 10.0 shuts both.
    "AllowTcpForwarding no": (lambda c: sshd_with(c, "AllowTcpForwarding no\n"), "", "srun"),
    "DisableForwarding yes": (lambda c: sshd_with(c, "DisableForwarding yes\n"), "", "srun"),
    "DisableForwarding yes, and no srun": (lambda c: sshd_with(c, "DisableForwarding yes\n"), NO_SRUN, "ssh-command"),
    "pam_slurm_adopt": (adopting, "", "paramiko"),
    "a /tmp of each login": (own_tmp, "", "paramiko"),
    "no sshd on the nodes": (sshd_away, "", "srun"),
    "no password-less SSH": (no_key, "", "srun"),
}


@pytest.mark.parametrize("name", SITES)
def test_auto_reaches_the_workspace(cluster: Cluster, name: str) -> None:
    site, before, route = SITES[name]
    with site(cluster):
        told = cluster.tell("login", before + REACH)
        assert told["error"] is None
        assert (told["route"], told["node"]) == (route, NODE)
        memory = cluster.run("login", ["sh", "-c", "cat ~/.hpc_workspace/route-login"]).stdout
        assert memory == route
        if route != "paramiko":
            again = cluster.tell("login", before + REACH)
            assert again["route"] == route
    assert cluster.leftovers() == {}


ADOPTED = f"""
import threading
def made():
    slurm = SlurmOptions(partition="cpu", time="10", mem="500M", nodelist={NODE!r})
    return ApptainerWorkspace(runtime="process", slurm=slurm, connect=CONNECT).start()
old, young = made(), made()
results = []
command = "mkfifo gate; echo ran >> runs; echo > began; cat gate; cat runs"
running = threading.Thread(target=lambda: results.append(young.execute_command(command).stdout))
running.start()
young.execute_command("until [ -e began ]; do sleep 0.01; done")
old.close()
young.execute_command("echo go > gate")
running.join()
tell(results=results)
young.close()
"""


def test_a_connection_that_was_adopted_by_a_job_that_ends_is_made_again_for_the_others(cluster: Cluster) -> None:
    with adopting(cluster):
        refused = cluster.run("login", ["ssh", "-o", "BatchMode=yes", NODE, "true"])
        assert "you have no active jobs on this node" in refused.stderr
        for connect in ("paramiko", "ssh-command"):
            told = cluster.tell("login", f"CONNECT = {connect!r}\n{ADOPTED}")
            assert told["results"] == ["go\nran\n"], told["stderr"]
        assert cluster.leftovers() == {}


def test_where_there_is_no_way_each_one_says_why_on_one_screen(cluster: Cluster) -> None:
    with sshd_away(cluster):
        error = cluster.tell("login", NO_SRUN + REACH)["error"]
    assert error["kind"] == "TunnelError"
    for route in ("loopback", "paramiko", "openssh", "srun", "ssh-command"):
        assert f"  {route}: " in error["text"], error["text"]
    assert "Connection refused" in error["text"]
    assert "There is no srun on PATH" in error["text"], error["text"]
    assert len(error["text"].splitlines()) < 24
    assert cluster.leftovers() == {}


def test_a_remembered_way_that_is_shut_is_passed_over(cluster: Cluster) -> None:
    cluster.run("login", ["sh", "-c", "echo openssh > ~/.hpc_workspace/route-login"])
    with sshd_away(cluster):
        assert cluster.tell("login", REACH)["route"] == "srun"


def test_ssh_s_own_configuration_is_honoured(cluster: Cluster) -> None:
    """An alias by Include and Match, a way through another node, and a user that the name does not say."""
    config = f"Include included\nMatch host {NODE}\n  User tester\n  ProxyJump n02\nHost *\n  User nobody-at-all\n"
    included = "Host n02\n  User tester\n"
    put = "mkdir -p ~/.ssh && cat > ~/.ssh/{}"
    cluster.run("login", ["sh", "-c", put.format("config")], stdin=config)
    cluster.run("login", ["sh", "-c", put.format("included")], stdin=included)
    try:
        code = REACH.replace(
            "tell(route=", "tell(hops=len(getattr(getattr(w._link._route, '_connection', None), 'hops', [])), route="
        )
        told = cluster.tell("login", code)
        assert (told["error"], told["route"], told["hops"]) == (None, "paramiko", 1)
        through_ssh = cluster.tell("login", code.replace('runtime="process"', 'runtime="process", connect="openssh"'))
        assert through_ssh["route"] == "openssh"
    finally:
        cluster.run("login", ["sh", "-c", "rm ~/.ssh/included"])
    assert cluster.leftovers() == {}


def test_a_host_key_that_is_not_known_is_refused_with_the_remedy(cluster: Cluster) -> None:
    config = "Host n0*\n  UserKnownHostsFile /dev/null\n  GlobalKnownHostsFile /dev/null\n"
    cluster.run("login", ["sh", "-c", "cat > ~/.ssh/config"], stdin=config)
    error = cluster.tell("login", REACH.replace('runtime="process"', 'runtime="process", connect="paramiko"'))["error"]
    assert error["kind"] == "HostKeyError"
    assert f"ssh-keyscan {NODE} >> ~/.ssh/known_hosts" in error["text"]
    assert cluster.leftovers() == {}
