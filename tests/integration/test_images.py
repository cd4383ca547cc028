"""Images on the real cluster: fetched once from its registry, whatever the registry does, and run whatever is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import VENV, Cluster

pytestmark = pytest.mark.cluster

REGISTRY_PROGRAM = Path(__file__).parents[1] / "registry.py"
IMAGES_PAGE = (Path(__file__).parents[2] / "docs/images.md").read_text()
PULL = f"{VENV}/hpc-workspace images pull"
BUSYBOX_LAYER_BYTES = 500_000  # less than its layer has: a cut there is one in the middle


class FaultyRegistry:
    """The cluster's own registry behind one that counts requests and makes faults, on the login node."""

    def __init__(self, cluster: Cluster, *flags: str) -> None:
        self.cluster = cluster
        cluster.run("login", ["sh", "-c", "cat > registry.py"], stdin=REGISTRY_PROGRAM.read_text())
        state = cluster.run("login", ["mktemp", "-d"]).stdout.strip()
        argv = ["python3", "registry.py", "--host=0.0.0.0", "--port=0", f"--state={state}", *flags]
        self._process = cluster.open("login", [*argv, "--upstream=http://login:5000"])
        assert self._process.stdout is not None
        word, port = self._process.stdout.readline().split()
        assert word == "LISTENING"
        self.host = f"login:{port}"

    def fault(self, kind: str, match: str, **more: Any) -> None:
        body = json.dumps({"kind": kind, "match": match, **more})
        self._curl("--data", body, f"http://{self.host}/faults")

    def seen(self, match: str) -> list[dict[str, Any]]:
        """The requests so far whose `METHOD path` contains `match`."""
        requests = json.loads(self._curl(f"http://{self.host}/requests"))
        return [request for request in requests if match in f"{request['method']} {request['path']}"]

    def _curl(self, *arguments: str) -> str:
        ended = self.cluster.run("login", ["curl", "--silent", "--show-error", "--fail", *arguments])
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture
def registry(cluster: Cluster) -> Iterator[FaultyRegistry]:
    faulty = FaultyRegistry(cluster)
    yield faulty
    faulty.close()


@pytest.fixture
def store(cluster: Cluster) -> Iterator[str]:
    """A new store on the shared disk, 0700."""
    path = cluster.run("login", ["mktemp", "-d", "-p", "/home/tester", "store-XXXXXX"]).stdout.strip()
    yield path
    cluster.run("login", ["rm", "-r", path])


def environment(host: str, store: str, **more: str) -> list[str]:
    values = {"HPC_WORKSPACE_IMAGES_PLAIN_HTTP": host, "HPC_WORKSPACE_CACHE": store, **more}
    return ["env", *(f"{name}={value}" for name, value in values.items())]


def pull(cluster: Cluster, node: str, registry: FaultyRegistry, store: str, image: str, **more: str) -> Any:
    return cluster.run(node, [*environment(registry.host, store, **more), *PULL.split(), f"{registry.host}/{image}"])


def digest_of(cluster: Cluster, image: str) -> str:
    """The digest of the manifest, as skopeo sees it."""
    argv = ["skopeo", "inspect", "--tls-verify=false", "--format={{.Digest}}", f"docker://login:5000/{image}"]
    return cluster.run("login", argv).stdout.strip().removeprefix("sha256:")


def left_in(cluster: Cluster, store: str) -> str:
    """What is in the store that is no image, no name of one and no whole layer."""
    find = "cd $0 && find claims work -mindepth 1; find . -name '*.part' -o -name '.*-*'"
    return cluster.run("login", ["sh", "-c", find, store]).stdout


def test_16_processes_on_two_nodes_fetch_an_image_once(cluster: Cluster, registry: FaultyRegistry, store: str) -> None:
    each = " ".join([*environment(registry.host, store), PULL, f"{registry.host}/busybox"])
    script = f"for i in 1 2 3 4 5 6 7 8; do {each} > $0.$i 2>&1 & done; wait; tail -qn1 $0.*; rm $0.*"
    processes = [cluster.open(node, ["sh", "-c", script, f"{store}/out-{node}"]) for node in ("n01", "n02")]
    lines = [line for process in processes for line in process.communicate(timeout=170)[0].split()]
    expected = digest_of(cluster, "busybox")
    assert lines == [f"{store}/images/{expected}-linux-amd64.sif"] * 16
    assert len(registry.seen("GET /v2/busybox/blobs/")) == 2  # configuration and layer
    assert len(registry.seen("GET /v2/busybox/manifests/")) == 1
    assert left_in(cluster, store) == ""


@pytest.mark.parametrize(
    ("kind", "match", "more"),
    [
        ("status", "GET /v2/busybox/manifests/", {"status": 429, "headers": {"Retry-After": "1"}, "times": 2}),
        ("status", "GET /v2/busybox/blobs/", {"status": 500, "times": 1}),
        ("status", "HEAD /v2/busybox/manifests/", {"status": 503, "times": 1}),
        ("cut", "GET /v2/busybox/blobs/", {"after_bytes": BUSYBOX_LAYER_BYTES, "times": 2}),
        ("corrupt", "GET /v2/busybox/blobs/", {"times": 1}),
    ],
)
def test_a_registry_that_fails_for_a_while_is_outlasted(
    cluster: Cluster, registry: FaultyRegistry, store: str, kind: str, match: str, more: dict[str, Any]
) -> None:
    registry.fault(kind, match, **more)
    ended = pull(cluster, "n01", registry, store, "busybox")
    assert ended.returncode == 0, ended.stderr
    assert cluster.run("n01", ["apptainer", "exec", ended.stdout.strip(), "/bin/echo", "runs"]).stdout == "runs\n"
    assert left_in(cluster, store) == ""


def test_what_came_before_a_cut_is_not_fetched_again(cluster: Cluster, registry: FaultyRegistry, store: str) -> None:
    registry.fault("cut", "GET /v2/busybox/blobs/", after_bytes=BUSYBOX_LAYER_BYTES, times=2)
    assert pull(cluster, "n01", registry, store, "busybox").returncode == 0
    ranges = [seen["range"] for seen in registry.seen("/blobs/") if seen["range"]]
    assert ranges == [f"bytes={BUSYBOX_LAYER_BYTES}-", f"bytes={2 * BUSYBOX_LAYER_BYTES}-"]


@pytest.mark.parametrize("scheme", ["bearer", "basic"])
def test_a_registry_that_wants_a_login(cluster: Cluster, store: str, scheme: str) -> None:
    registry = FaultyRegistry(cluster, "--login=ada:of-the-pipe|dream", f"--scheme={scheme}")
    try:
        refused = pull(cluster, "n01", registry, store, "busybox")
        assert refused.returncode == 255
        assert "wants a login" in refused.stderr
        assert "apptainer registry login" in refused.stderr
        wrong = {"APPTAINER_DOCKER_USERNAME": "ada", "APPTAINER_DOCKER_PASSWORD": "not-this"}
        refused = pull(cluster, "n01", registry, store, "busybox", **wrong)
        assert "the login of $APPTAINER_DOCKER_USERNAME is not enough" in refused.stderr
        assert "not-this" not in refused.stderr
        cluster.run("n01", ["mkdir", "-p", f"{store}-docker"])
        auth = {"auths": {registry.host: {"auth": "YWRhOm9mLXRoZS1waXBlfGRyZWFt"}}}
        cluster.run("n01", ["sh", "-c", "cat > $0", f"{store}-docker/config.json"], stdin=json.dumps(auth))
        ended = pull(cluster, "n01", registry, store, "busybox", DOCKER_CONFIG=f"{store}-docker")
        assert ended.returncode == 0, ended.stderr
        assert {seen["status"] for seen in registry.seen("/blobs/")} == {200}
    finally:
        cluster.run("login", ["rm", "-rf", f"{store}-docker"])
        registry.close()


def test_archives_and_oras_become_the_same_image(cluster: Cluster, registry: FaultyRegistry, store: str) -> None:
    archive = f"{store}/a file, with:signs.tar"
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", "docker://login:5000/busybox"]
    pushed = f"oras://login:5000/sif/busybox:{Path(store).name}"
    push = ["apptainer", "push", "--no-https", "/shared/images/busybox.sif", pushed]
    for argv in ([*copy, f"docker-archive:{store}/plain.tar"], ["mv", f"{store}/plain.tar", archive], push):
        ended = cluster.run("login", argv)
        assert ended.returncode == 0, ended.stderr
    for reference in (f"docker-archive:{archive}", pushed.replace("login:5000", registry.host)):
        argv = [*environment(registry.host, store), *PULL.split(), reference]
        ended = cluster.run("n01", argv)
        assert ended.returncode == 0, ended.stderr
        assert cluster.run("n01", ["apptainer", "exec", ended.stdout.strip(), "/bin/echo", "ok"]).stdout == "ok\n"


@pytest.mark.parametrize(
    ("moment", "tail"),
    [("in the middle of a download", "downloading"), ("in the middle of a conversion", "converting")],
)
def test_a_pull_that_is_killed_leaves_nothing_that_is_trusted_and_nothing_that_runs(
    cluster: Cluster, registry: FaultyRegistry, store: str, moment: str, tail: str
) -> None:
    if tail == "downloading":
        registry.fault("stall", "GET /v2/tiny/blobs/", after_bytes=5_000_000, times=1)
    say_pid = "echo $$; exec"
    argv = [*environment(registry.host, store), "sh", "-c", f'{say_pid} "$@"', "sh", *PULL.split()]
    process = cluster.open("n03", [*argv, f"{registry.host}/tiny"])
    assert process.stdout is not None
    assert process.stderr is not None
    pid = int(process.stdout.readline())
    for line in process.stderr:
        if tail in line:
            break
    if tail == "downloading":
        registry_has_sent = f"for i in $(seq 500); do [ $(stat -c %s {store}/layers/*.part) -ge 4000000 ] && exit; done"
        cluster.run("n03", ["sh", "-c", registry_has_sent])
    cluster.kill("n03", pid)
    process.wait(30)
    assert cluster.leftovers(("n03",)) == {}  # the runtime and mksquashfs are ended with it
    assert cluster.run("n03", ["find", f"{store}/images", "-type", "f"]).stdout == ""
    ended = pull(cluster, "n03", registry, store, "tiny")
    assert ended.returncode == 0, ended.stderr
    if tail == "downloading":
        assert [seen["range"] for seen in registry.seen("/blobs/") if seen["range"]]
    assert left_in(cluster, store) == ""


def test_home_and_tmp_are_not_filled(cluster: Cluster, registry: FaultyRegistry, store: str) -> None:
    look = "du -sk ~/.apptainer /tmp 2>/dev/null | cut -f1; ls -A /tmp"
    before = cluster.run("n03", ["sh", "-c", look]).stdout
    assert pull(cluster, "n03", registry, store, "tiny").returncode == 0
    assert cluster.run("n03", ["sh", "-c", look]).stdout == before


def test_a_disk_without_room_is_said_before_a_byte_comes(cluster: Cluster, registry: FaultyRegistry) -> None:
    small = "/tmp/small"
    mount = f"mkdir {small} && mount -t tmpfs -o size=60m,uid=2001,mode=700 tmpfs {small}"
    cluster.run("n03", ["sh", "-c", mount], user="root")
    try:
        ended = pull(cluster, "n03", registry, small, "tiny")
    finally:
        cluster.run("n03", ["sh", "-c", f"umount {small} && rmdir {small}"], user="root")
    assert ended.returncode == 255
    assert "There is not enough room" in ended.stderr
    assert registry.seen("GET /v2/tiny/blobs/") == []


def test_a_conversion_stays_within_the_memory_and_the_cpus_of_its_job(
    cluster: Cluster, registry: FaultyRegistry, store: str
) -> None:
    """In a job of 300 MB; the runtime's own conversion of the same image, without bounds, is killed there."""
    srun = ["srun", "-p", "cpu", "-w", "n02", "--mem=300M", "--cpus-per-task=1", "--quiet"]
    unbounded = ["apptainer", "build", "--disable-cache", f"{store}/x.sif", "docker://login:5000/debian-old"]
    killed = cluster.run("login", ["env", "APPTAINER_NOHTTPS=1", f"APPTAINER_TMPDIR={store}", *srun, *unbounded])
    assert killed.returncode != 0
    assert "oom" in killed.stderr.lower(), killed.stderr
    argv = [*environment(registry.host, store), *srun, *PULL.split(), f"{registry.host}/debian-old"]
    ended = cluster.run("login", argv)
    assert ended.returncode == 0, ended.stderr


def test_on_a_login_node_the_image_is_fetched_where_the_settings_say_and_never_by_a_job(
    cluster: Cluster, registry: FaultyRegistry, store: str
) -> None:
    code = f"""
said = []
def start(name):
    w = ApptainerWorkspace(image="{registry.host}/busybox", slurm=SLURM)
    w.on_progress = said.append
    with w:
        return w.execute_command("echo here").stdout
import concurrent.futures
with concurrent.futures.ThreadPoolExecutor(3) as pool:
    tell(outputs=list(pool.map(start, range(3))), said=said)
"""
    env = {
        "HPC_WORKSPACE_IMAGES_PLAIN_HTTP": registry.host,
        "HPC_WORKSPACE_CACHE": store,
        "HPC_WORKSPACE_IMAGES_FETCH_ON": "debug",
    }
    told = cluster.tell("login", code, env=env)
    assert told["outputs"] == ["here\n"] * 3
    assert sum("converting" in line for line in told["said"]) == 1
    addresses = {seen["client"].rpartition(":")[0] for seen in registry.seen("/v2/busybox")}
    login = cluster.run("login", ["getent", "hosts", "login"]).stdout.split()[0]
    assert len(addresses) == 1
    assert login not in addresses
    assert len(registry.seen("GET /v2/busybox/blobs/")) == 2


def test_where_the_partition_can_t_fetch_it_its_words_are_in_the_error(
    cluster: Cluster, registry: FaultyRegistry, store: str
) -> None:
    for partition, words in (("debug", f"{registry.host} has no nothing:latest"), ("nowhere", "nvalid partition")):
        ended = pull(cluster, "login", registry, store, "nothing", HPC_WORKSPACE_IMAGES_FETCH_ON=partition)
        assert ended.returncode == 255
        assert words in ended.stderr
        assert "Failed to pull and convert Docker image" in ended.stderr


def test_a_batch_fetches_its_image_before_its_pilots_start(
    cluster: Cluster, registry: FaultyRegistry, store: str
) -> None:
    code = f"""
import tempfile
from hpc_workspace.batch.evaluate import evaluate
def agent(workspace, task):
    return workspace.execute_command("echo $0", timeout=60).stdout
with tempfile.TemporaryDirectory(dir=Path.home()) as run_dir:
    report = evaluate(agent, [dict(id=str(n)) for n in range(4)], image="{registry.host}/busybox", run_dir=run_dir,
                      slurm=SLURM, pilots=2, workspaces_per_pilot=2)
    tell(counts=report.counts)
"""
    env = {"HPC_WORKSPACE_IMAGES_PLAIN_HTTP": registry.host, "HPC_WORKSPACE_CACHE": store}
    assert cluster.tell("login", code, env=env)["counts"] == {"done": 4}
    login = cluster.run("login", ["getent", "hosts", "login"]).stdout.split()[0]
    assert {seen["client"].rpartition(":")[0] for seen in registry.seen("/v2/busybox")} <= {login, "127.0.0.1"}


# What each kind of image is, as its commands see it: name, its Python, its git, a command and what it prints.
KINDS = {
    "tiny": ("Python 3.13", "", "sed -n 's/^NAME=//p' /etc/os-release", '"Debian GNU/Linux"'),
    "debian-plain": ("", "", "cat /etc/debian_version | cut -d. -f1", "13"),
    "debian-old": ("Python 3.9", "git version 2.30", "python2.7 -c 'print 6 * 7'", "42"),
    "busybox": ("", "", "ls /lib 2>&1 | grep -c ld-", "0"),
    "musl": ("", "", "ls /lib", "ld-musl-x86_64.so.1"),
    "entrypoint": ("", "", "tool; echo $FROM_ENTRYPOINT, $FROM_IMAGE", "tool\nset by the entrypoint, a value, with a comma"),
    "agent-server": ("Python 3.13", "git version 2", "jq --version | cut -d- -f1", "jq"),
}  # fmt: skip


def test_every_kind_of_image_that_is_run_is_in_the_docs_with_what_it_lacks() -> None:
    rows = {row[1].strip("` "): row for row in (line.split("|") for line in IMAGES_PAGE.splitlines()) if len(row) == 7}
    assert set(KINDS) <= set(rows)
    for kind, (python, git, _, _) in KINDS.items():
        missing = rows[kind][5]
        assert ("Python" in missing, "git" in missing) == (not python, not git)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_server_serves_in_any_image_and_the_commands_see_the_image_alone(
    cluster: Cluster, kind: str
) -> None:
    python, git, command, expected = KINDS[kind]
    code = f"""
import tempfile
with tempfile.TemporaryDirectory(prefix="repo-", dir=Path.home()) as repo:
    git = ["git", "-C", repo, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    Path(repo, "a file").write_text("one")
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "first"], check=True)
    Path(repo, "a file").write_text("two")
    Path(repo, "new").write_text("three")
    plain = ["apptainer", "--quiet", "exec", "--cleanenv", "--containall", "--fakeroot", "/shared/images/{kind}.sif"]
    with ApptainerWorkspace(image="/shared/images/{kind}.sif", mount_dir=repo) as w:
        def out(command):
            return w.execute_command(command, timeout=60).stdout.strip()
        tell(
            python=out("python3 --version 2>&1 || true"),
            git=out("git --version 2>&1 || true"),
            special=out({command!r}),
            variables=out("env").splitlines(),
            plain=subprocess.run([*plain, "env"], capture_output=True, text=True, check=True).stdout.splitlines(),
            path=out("echo $PATH").split(":"),
            changes={{c.path: c.status for c in w.git_changes(".")}},
            diff=[w.git_diff("a file").original, w.git_diff("a file").modified],
            patch=w.patch().decode(),
            inside=w.write_file("x", b"y") and w.read_file("x").decode(),
        )
"""
    told = cluster.tell("n01", code)
    assert told["python"].startswith(python) if python else "not found" in told["python"]
    assert told["git"].startswith(git) if git else "not found" in told["git"]
    assert told["special"] == expected
    # What the runtime itself gives, what the shell sets, the mark of the workspace, and what the entrypoint exports.
    expected_more = {"PWD", "SHLVL", "OLDPWD", "_", "HPC_WORKSPACE_SESSION", "FROM_ENTRYPOINT"}
    expected_more.add("HPC_WORKSPACE_COMMAND")
    more = {pair.partition("=")[0] for pair in set(told["variables"]) - set(told["plain"])}
    more = {name for name in more if not name.startswith(("APPTAINER_", "SINGULARITY_"))}
    assert more <= expected_more | ({"PATH"} if kind == "entrypoint" else set())
    assert not [place for place in told["path"] if place.startswith("/.hw")]
    assert told["changes"] == {"a file": "UPDATED", "new": "ADDED"}
    assert told["diff"] == ["one", "two"]
    for part in ("diff --git a/a file b/a file", "-one", "+two", "diff --git a/new b/new", "+three"):
        assert part in told["patch"]
    assert told["inside"] == "y"


def test_toolboxes_are_made_once_however_many_nodes_want_one(cluster: Cluster, store: str) -> None:
    code = "from hpc_workspace.toolbox import ensure_toolbox; tell(path=str(ensure_toolbox(Path(os.environ['S']))))"
    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(lambda n: cluster.tell(f"n0{n % 3 + 1}", code, env={"S": store}), range(6)))
    assert len({one["path"] for one in told}) == 1
    assert cluster.run("login", ["ls", "-A", store]).stdout.split() == [Path(told[0]["path"]).name]
