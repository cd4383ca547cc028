"""The doctor on this machine: each fault is made for real, by root where it takes root, or by programs on PATH."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from hpc_workspace.config import load_settings
from hpc_workspace.doctor import advice, reach, slurm
from hpc_workspace.doctor.checks import MACHINE, SITE
from hpc_workspace.doctor.finding import Check, Finding, Verdict, fail, ok, warn
from hpc_workspace.doctor.here import judge_skew
from hpc_workspace.doctor.node_job import build_argv, find_remedy, pick_line
from hpc_workspace.doctor.reach import Tried, judge_routes
from hpc_workspace.doctor.runner import run_checks
from hpc_workspace.doctor.site import Site
from hpc_workspace.errors import ConfigError, TunnelError
from hpc_workspace.options import SlurmOptions

REPO = Path(__file__).parents[2]
LAYER = REPO / "tests/layers/layer.c"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="it mounts: run as root")
with_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="it compiles tests/layers/layer.c: install gcc")


@pytest.fixture(autouse=True)
def _nobodys_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no settings and no job of whoever runs the tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("SLURM", "TMPDIR", "HPC_WORKSPACE_IMAGES")):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir(mode=0o700)


def look(name: str, site: Site | None = None) -> Finding | None:
    """What one check finds; None if it has nothing to look at."""
    checks = [check for check in (*MACHINE, *SITE) if check.name == name]
    assert len(checks) == 1
    found = run_checks(checks, site or Site())
    return found[0] if found else None


def found(name: str) -> Finding:
    finding = look(name)
    assert finding is not None
    return finding


def doctor(*arguments: str, env: Mapping[str, str] | None = None, under: Sequence[str] = ()) -> dict[str, Finding]:
    """The findings of a doctor in a process of its own, by name (of the node's with `@` after it)."""
    argv = [*under, sys.executable, "-m", "hpc_workspace.cli", "doctor", "--json", *arguments]
    ended = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=120, check=False
    )
    assert ended.returncode in (0, 1), ended.stderr
    findings = [Finding.parse(value) for value in json.loads(ended.stdout)["findings"]]
    assert ended.returncode == int(any(finding.level == "fail" for finding in findings))
    return {finding.name + ("@" if finding.node else ""): finding for finding in findings}


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is first on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return tmp_path / "bin"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts tmpfs with options; each is unmounted at the end."""
    made: list[Path] = []

    def mount(options: str, name: str = "mounted") -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], check=True)
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", path], check=True)


# The runner.


def test_a_check_that_breaks_or_hangs_is_a_failure_and_stops_no_other() -> None:
    def breaks(site: Site) -> Verdict:
        raise ZeroDivisionError("of its own")

    never = threading.Event()

    def hangs(site: Site) -> Verdict:
        never.wait()
        return ok("late")

    checks = [
        Check("a", "", breaks), Check("b", "", hangs), Check("c", "", lambda site: None),
        Check("d", "because", lambda site: ok("fine")),
    ]  # fmt: skip
    findings = run_checks(checks, Site(), timeout_s=0.3)
    never.set()
    assert [(finding.name, finding.level) for finding in findings] == [("a", "fail"), ("b", "fail"), ("d", "ok")]
    assert findings[0].found == "the check itself broke: ZeroDivisionError: of its own"
    assert findings[1].found == "no answer within 0.3 s"
    assert findings[2].why == "because"


def test_a_question_of_several_checks_is_asked_once_and_fails_for_all() -> None:
    site = Site()
    asked: list[int] = []

    def ask() -> str:
        asked.append(1)
        raise KeyError("silent")

    for _ in range(2):
        with pytest.raises(KeyError):
            site.once("question", ask)
    assert asked == [1]


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    for finding in run_checks([*MACHINE, *SITE], Site()):
        assert finding.why
        assert finding.level == "ok" or finding.remedy, finding


def test_docs_doctor_md_has_every_check_and_says_why() -> None:
    text = (REPO / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| (?!check|---)([^|]+?) \| ([^|]+?) \| [^|]+ \| [^|]+ \|$", text, re.MULTILINE)
    checks: list[tuple[str, str]] = [(check.name, check.why) for check in (*MACHINE, *SITE)]
    checks += [(one.name, one.why) for one in reach.LOOKS]
    checks.append((reach.ROUTE.format("NAME"), reach.ROUTES_WHY))
    assert rows == checks


# This machine.


def test_a_state_directory_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").chmod(0o777)
    finding = found("state directory")
    assert finding.level == "fail"
    assert "can be written by everybody (mode 0777)" in finding.found
    assert finding.remedy == f"chmod go-w {tmp_path}/home"
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o777  # looked at, not mended


def test_a_state_directory_that_is_not_there_is_tried_above_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_HOME", str(tmp_path / "not/there"))
    assert found("state directory").level == "ok"
    assert "(to be made)" in found("state directory").found
    assert found("locks").level == "ok"
    assert not (tmp_path / "not").exists()


@as_root
def test_a_state_directory_that_is_read_only(mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_HOME", str(mounted("ro,mode=700")))
    finding = found("state directory")
    assert finding.level == "fail"
    assert "Read-only file system" in finding.found
    assert "HPC_WORKSPACE_HOME" in finding.remedy
    assert found("state room").level == "fail"
    assert found("locks").level == "warn"
    assert found("clock").level == "warn"


@as_root
def test_a_state_directory_of_somebody_else(tmp_path: Path) -> None:
    os.chown(tmp_path / "home", 12345, 12345)
    assert "is not a directory of yours" in found("state directory").found


@as_root
def test_a_state_directory_that_is_full(mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    full = mounted("size=1M,mode=700")
    (full / "fill").write_bytes(bytes(900_000))
    monkeypatch.setenv("HPC_WORKSPACE_HOME", str(full))
    finding = found("state room")
    assert finding.level == "fail"
    assert "No space left on device" in finding.found
    assert found("state directory").level == "ok"


def test_a_file_system_without_files_left_is_full(
    mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("it mounts: run as root")
    monkeypatch.setenv("HPC_WORKSPACE_HOME", str(mounted("size=400M,nr_inodes=50,mode=700")))
    assert found("state room").level == "fail"


def test_a_state_directory_with_a_newline_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_HOME", "/tmp/a\nb")
    findings = run_checks(MACHINE, Site())
    assert {finding.name for finding in findings} >= {"state directory", "state room", "scratch"}
    assert not [finding for finding in findings if "broke" in finding.found]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> str:
    built = tmp_path_factory.mktemp("layer") / "layer.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, LAYER], check=True)
    return str(built)


@with_cc
@pytest.mark.parametrize(
    ("how", "said"),
    [("ENOSYS", "no locks (ENOSYS)"), ("ENOLCK", "no locks (ENOLCK)"), ("LIES", "two processes hold one lock")],
)
def test_locks_that_fail_or_lie(layer: str, how: str, said: str) -> None:
    finding = doctor(env={"LD_PRELOAD": layer, "LAYER_FLOCK": how})["locks"]
    assert finding.level == "warn"
    assert said in finding.found
    assert "Nothing breaks" in finding.remedy


@with_cc
@pytest.mark.parametrize(("off", "side"), [("600", "ahead of"), ("-600", "behind")])
def test_a_clock_that_is_ten_minutes_off(layer: str, off: str, side: str) -> None:
    finding = doctor(env={"LD_PRELOAD": layer, "LAYER_CLOCK_S": off})["clock"]
    assert finding.level == "warn"
    assert finding.found == f"600 s {side} the file server's clock"


def test_a_skew_is_told_with_its_side() -> None:
    assert judge_skew(0.4, "n01's clock") == ok("0.4 s from n01's clock")
    assert judge_skew(-301, "n01's clock").found == "301 s behind n01's clock"


def over_tmp(options: str) -> list[str]:
    """The argv that runs a command with another file system at /tmp; this checkout stays where it is, there too."""
    script = (
        f"mount --bind /tmp /mnt && mount -t tmpfs -o {options} none /tmp && "
        'case "$0" in /tmp/*) mkdir -p "$0" && mount --bind "/mnt/${0#/tmp/}" "$0" ;; esac && exec "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, str(REPO)]


@as_root
def test_scratch_that_is_full(mounted: Callable[..., Path]) -> None:
    # /tmp is among the candidates, and the roomiest counts: in a mount namespace of its own it can be full.
    under = over_tmp("size=900k")
    home = {"HPC_WORKSPACE_HOME": "/var/tmp/hpcws-doctor-test"}
    finding = doctor(env=home, under=under)["scratch"]
    assert finding.level == "fail"
    assert "No space left on device" in finding.found
    assert "TMPDIR" in finding.remedy


@as_root
@pytest.mark.parametrize(
    ("options", "level", "said"),
    [("size=9G,noexec", "fail", "mounted noexec"), ("size=9G", "warn", "counts as the job's memory")],
)
def test_scratch_that_can_not_do_all(options: str, level: str, said: str) -> None:
    under = over_tmp(options)
    finding = doctor(env={"HPC_WORKSPACE_HOME": "/var/tmp/hpcws-doctor-test"}, under=under)["scratch"]
    assert finding.level == level
    assert said in finding.found


def test_a_store_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    finding = found("image store")
    assert finding.level == "fail"
    assert "chmod o-w" in finding.remedy


@as_root
def test_a_store_without_room_is_recommended_another_place_that_the_site_names(
    mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_CACHE", str(mounted("size=100M,mode=700", "small")))
    roomy = mounted("size=90G,mode=700", "roomy")
    monkeypatch.setenv("SCRATCH", str(roomy))
    finding = found("image store")
    assert finding.level == "warn"
    assert finding.recommends == {"workspace.cache_dir": f"{roomy}/hpc-workspace-images"}


def test_a_store_that_the_node_does_not_see() -> None:
    finding = look("image store", Site(is_node=True, has_store=True))
    assert finding is not None
    assert finding.level == "fail"
    assert "is not there on this node" in finding.found


@pytest.fixture
def registry() -> Iterator[socket.socket]:
    """Something that listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_a_registry_that_answers_and_one_that_does_not(
    registry: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = registry.getsockname()[1]
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_PLAIN_HTTP", f"127.0.0.1:{port}")
    assert found("dns").level == "ok"
    assert re.match(rf"127.0.0.1:{port} answers in \d+ ms$", found("internet").found)
    registry.close()
    finding = found("internet")
    assert finding.level == "warn"
    assert "images pull" in finding.remedy


def test_a_name_that_can_not_be_resolved_is_one_warning() -> None:
    os.environ["HPC_WORKSPACE_IMAGES_PLAIN_HTTP"] = "registry.invalid:5000"
    try:
        assert found("dns").level == "warn"
        assert look("internet") is None
    finally:
        del os.environ["HPC_WORKSPACE_IMAGES_PLAIN_HTTP"]


def test_a_network_is_not_missed_where_images_are_fetched_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_PLAIN_HTTP", "registry.invalid:5000")
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_FETCH_ON", "transfer")
    assert found("dns").level == "ok"
    monkeypatch.delenv("HPC_WORKSPACE_IMAGES_FETCH_ON")
    finding = look("dns", Site(is_node=True))
    assert finding is not None
    assert finding.level == "ok"


def test_a_node_with_a_network_is_recommended_where_there_is_none_here(
    registry: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_PLAIN_HTTP", f"127.0.0.1:{registry.getsockname()[1]}")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "transfer")
    finding = look("internet", Site(is_node=True, lacks_network=True))
    assert finding is not None
    assert finding.recommends == {"images.fetch_on": "transfer"}


def test_a_proxy_is_what_is_connected_to(registry: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    port = registry.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://ada:s3cret@127.0.0.1:{port}")
    finding = found("internet")
    assert finding.level == "ok"
    assert finding.found.startswith(f"127.0.0.1:{port} answers")


def test_settings_that_are_wrong_are_a_failure_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "config/hpc-workspace/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("[slurm]\npartitoin = 'cpu'\n")
    finding = found("settings")
    assert finding.level == "fail"
    assert "slurm.partitoin: is no setting" in finding.found
    assert found("scratch").level in ("ok", "warn")


# The runtime.

APPTAINER = """#!/bin/sh
case "$*" in
    --version) echo "apptainer version 1.4.5" ;;
    "run --help") echo "--containall --mount --no-eval --no-init --no-mount --no-umask --overlay" ;;
    buildcfg) echo "LIBEXECDIR=ROOT/libexec"; echo "APPTAINER_CONF_FILE=ROOT/apptainer.conf" ;;
    *) echo "FATAL:   container creation failed: Failed to create user namespace: not here" >&2; exit 255 ;;
esac
"""


@pytest.fixture
def apptainer(tmp_path: Path, bin_dir: Path) -> Path:
    """The root of an Apptainer's files: one that says what a real one says of itself, and runs nothing."""
    program(bin_dir / "apptainer", APPTAINER.replace("ROOT", str(tmp_path)))
    (tmp_path / "apptainer.conf").write_text("# comment = 1\nallow setuid = yes\nsessiondir max size = 64\n")
    return tmp_path


def test_a_machine_without_a_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    finding = found("runtime")
    assert finding.level == "fail"
    assert "none on PATH" in finding.found
    assert "module load apptainer" in finding.remedy
    for name in ("runtime mode", "container", "sif", "fakeroot", "overlay", "fuse programs", "session directory"):
        assert look(name) is None


def test_a_login_node_without_a_runtime_is_warned_only(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bin_dir / "sbatch", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{bin_dir}:/nowhere")
    finding = found("runtime")
    assert finding.level == "warn"
    assert "images.fetch_on" in finding.remedy
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert found("runtime").level == "fail"


def test_a_runtime_that_a_module_brings_is_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "module/singularity", "#!/bin/sh\n")
    (tmp_path / ".bash_profile").write_text(
        f'module() {{ [ "$*" = "load singularity" ] && PATH="{tmp_path}/module:$PATH"; }}\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    finding = found("runtime")
    assert finding.recommends == {"slurm.setup": ["module load singularity"]}
    assert "`module load singularity` brings it" in finding.found


def test_a_runtime_that_is_too_old(apptainer: Path) -> None:
    text = (apptainer / "bin/apptainer").read_text()
    (apptainer / "bin/apptainer").write_text(text.replace("--no-eval ", ""))
    assert found("runtime").level == "fail"
    assert "has no --no-eval" in found("runtime").found


@pytest.mark.parametrize(
    ("size", "level", "said"),
    [("16", "warn", "16 MiB"), ("64", "ok", "64 MiB"), ("4096", "ok", "4096 MiB"), ("", "warn", "is not in")],
)
def test_the_session_directory_is_read_from_the_runtimes_configuration(
    apptainer: Path, size: str, level: str, said: str
) -> None:
    (apptainer / "apptainer.conf").write_text(f"#sessiondir max size = 9\nsessiondir max size = {size}\n")
    finding = found("session directory")
    assert finding.level == level
    assert said in finding.found


@as_root
@pytest.mark.parametrize(("allowed", "mode"), [("yes", "set-uid root"), ("no", "unprivileged")])
def test_set_uid_is_by_the_starter_and_by_the_configuration(apptainer: Path, allowed: str, mode: str) -> None:
    program(apptainer / "libexec/apptainer/bin/starter-suid", "").chmod(0o4755)
    (apptainer / "apptainer.conf").write_text(f"allow setuid = {allowed}\n")
    assert found("runtime mode").found.startswith(mode)


def test_without_a_set_uid_starter_a_runtime_is_unprivileged(apptainer: Path) -> None:
    program(apptainer / "libexec/apptainer/bin/starter-suid", "")
    assert found("runtime mode").found.startswith("unprivileged")


def test_fuse_programs_are_found_on_path_and_with_the_runtime(apptainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{apptainer}/bin:/nowhere")
    if shutil.which("fusermount", path="/bin:/usr/bin"):  # os.defpath is looked at too
        pytest.skip("this machine has FUSE programs of its own")
    assert found("fuse programs").level == "warn"
    for name in ("squashfuse_ll", "fuse2fs"):
        program(apptainer / "libexec/apptainer/bin" / name, "")
    program(apptainer / "bin/fuse-overlayfs", "")
    finding = found("fuse programs")
    assert finding.level == "ok"
    assert finding.found == "no gocryptfs; squashfuse, fuse-overlayfs, fuse2fs (for encrypted images only)"


def test_a_container_that_does_not_run_is_told_in_the_runtimes_own_words(apptainer: Path) -> None:
    for name in ("container", "sif"):
        assert found(name).level == "fail"
    for name in ("fakeroot", "overlay"):
        assert found(name).level == "warn"
    finding = found("container")
    assert finding.found == "FATAL:   container creation failed: Failed to create user namespace: not here"
    assert finding.remedy.startswith("This node allows no unprivileged user namespaces")


@as_root
def test_user_namespaces_that_the_kernel_refuses(tmp_path: Path) -> None:
    """To a process whose root is not its mount namespace's, the kernel refuses them; user_namespaces(7), EPERM."""
    (tmp_path / "root").mkdir()
    script = f'mount --rbind / {tmp_path}/root && exec chroot {tmp_path}/root "$@"'
    finding = doctor(under=["unshare", "--mount", "sh", "-c", script, "sh"])["user namespaces"]
    assert finding.level == "fail"
    assert "unshare: Operation not permitted" in finding.found
    assert "user.max_user_namespaces" in finding.remedy


@pytest.mark.skipif(
    subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True, check=False).returncode != 0,
    reason="it makes a user namespace with a limit of its own: this machine allows none",
)
def test_user_namespaces_that_are_limited_to_none() -> None:
    """A limit of a user namespace's own, as user.max_user_namespaces = 0 is that of the whole machine."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    finding = doctor(under=["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"])["user namespaces"]
    assert finding.level == "fail"
    assert "No space left on device" in finding.found
    assert finding.found.endswith("user.max_user_namespaces = 0")


# Slurm, of programs on PATH that answer as Slurm 24.11 did on the test cluster.

CONFIG = """Configuration data as of 2026-11-24T10:00:00
AccountingStorageEnforce = associations,limits
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = box
JobContainerType        = (null)
MaxArraySize            = 1001
MaxJobCount             = 10000
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
ProctrackType           = proctrack/cgroup
TaskPlugin              = task/cgroup
"""
TEST_ONLY = "sbatch: Job 7 to start at 2026-11-24T10:00:00 using 1 processors on nodes n01 in partition long"
SBATCH = f"""#!/bin/sh
case "$*" in
    --version) echo "slurm 24.11.5" ;;
    *--partition=long*) echo "{TEST_ONLY}" >&2 ;;
    *) echo "allocation failure: No partition specified or system default partition" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def cluster_commands(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of Slurm's commands, of a site without a default partition."""
    program(bin_dir / "sbatch", SBATCH)
    program(bin_dir / "scontrol", f"#!/bin/sh\ncat << EOF\n{CONFIG}EOF\n")
    program(
        bin_dir / "sinfo",
        "#!/bin/sh\nprintf 'down\\037inact\\0371:00\\nshort\\037up\\0371:00\\nlong\\037up\\0371-00\\n'\n",
    )
    program(bin_dir / "sacctmgr", "#!/bin/sh\nprintf 'phys|||100|20|||||\\nchem|||||||||\\n'\n")
    for name in ("squeue", "scancel", "srun", "sacct"):
        program(bin_dir / name, "#!/bin/sh\n")
    return bin_dir


def test_a_site_without_a_default_partition_is_recommended_one_that_takes_the_job(cluster_commands: Path) -> None:
    findings = {finding.name: finding for finding in run_checks(SITE, Site())}
    assert findings["slurm commands"].found == "slurm 24.11.5"
    assert findings["slurm controller"].found.startswith("box, answers in")
    assert findings["partitions"].level == "warn"
    assert findings["submit"].level == "warn"
    assert findings["submit"].found == "allocation failure: No partition specified or system default partition"
    assert findings["submit"].recommends == {"slurm.partition": "long"}
    assert findings["job limits"].found == "MaxArraySize 1001, MaxJobCount 10000"
    assert findings["accounts"].found.startswith("phys, chem; MaxJobs 20, MaxSubmitJobs 100")
    assert findings["accounting"].found == "sacct answers"
    assert "requeue=True" in findings["preemption"].found
    assert findings["tracking"].level == "ok"
    assert findings["private /tmp"].level == "ok"
    assert 'partition = "long"' in advice.format_config(findings.values())


def test_a_job_that_slurm_takes_is_told_with_its_start(cluster_commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_SLURM_PARTITION", "long")
    assert found("submit").found == "a job would start at 2026-11-24T10:00:00 on n01, partition long"
    monkeypatch.setenv("HPC_WORKSPACE_SLURM_PARTITION", "gone")
    assert found("partitions").level == "fail"
    assert found("submit").level == "fail"


def test_a_silent_controller_is_one_failure_and_asked_once(cluster_commands: Path) -> None:
    asked = cluster_commands / "asked"
    program(
        cluster_commands / "scontrol",
        f"#!/bin/sh\necho x >> {asked}\necho 'Unable to contact slurm controller (connect failure)' >&2\nexit 1\n",
    )
    findings = run_checks(SITE, Site())
    assert [(finding.name, finding.level) for finding in findings] == [
        ("slurm commands", "ok"), ("slurm controller", "fail"),
    ]  # fmt: skip
    assert "Unable to contact slurm controller" in findings[1].found
    assert asked.read_text() == "x\n"


@pytest.mark.parametrize(
    ("old", "new", "name", "level", "said"),
    [
        ("proctrack/cgroup", "proctrack/linuxproc", "tracking", "warn", "linuxproc"),
        ("task/cgroup", "task/affinity", "tracking", "warn", "task/affinity"),
        ("(null)", "job_container/tmpfs", "private /tmp", "ok", "each job has its own"),
        ("= 1001", "= 101", "job limits", "warn", "MaxArraySize 101"),
        ("accounting_storage/slurmdbd", "accounting_storage/none", "accounting", "ok", "none: a job that squeue has"),
        ("preempt/partition_prio", "preempt/none", "preemption", "ok", "no job is preempted"),
    ],
)
def test_what_slurms_configuration_means(
    cluster_commands: Path, old: str, new: str, name: str, level: str, said: str
) -> None:
    program(cluster_commands / "scontrol", f"#!/bin/sh\ncat << EOF\n{CONFIG.replace(old, new)}EOF\n")
    finding = found(name)
    assert finding.level == level
    assert said in finding.found


def test_a_user_without_an_account_where_slurm_enforces_them(cluster_commands: Path) -> None:
    program(cluster_commands / "sacctmgr", "#!/bin/sh\n")
    assert found("accounts").level == "fail"


def test_a_machine_with_half_of_slurm(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bin_dir / "sbatch", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{bin_dir}:/nowhere")
    finding = found("slurm commands")
    assert finding.level == "fail"
    assert finding.found == "no squeue, scancel, srun, scontrol on PATH"


def test_a_partition_is_read_once_with_its_default() -> None:
    text = "cpu*\x1fup\x1f1-00:00:00\ncpu*\x1fup\x1f1-00:00:00\nold\x1fdown\x1finfinite\nnoise\n"
    assert slurm.parse_partitions(text) == [
        slurm.Partition("cpu", True, True, "1-00:00:00"), slurm.Partition("old", False, False, "infinite"),
    ]  # fmt: skip


def test_nodes_are_told_by_their_states() -> None:
    mixed = slurm.parse_nodes("n01\x1fidle\nn01\x1fidle\nn02\x1fidle\nn03\x1fdown*\n")
    assert mixed == slurm.NodesWord("n01, n02: idle; n03: down* (does not answer Slurm)", are_silent=False)
    assert slurm.parse_nodes("n03\x1fcompleting*\n").are_silent
    assert slurm.parse_nodes("".join(f"n{n:02}\x1fdrained\n" for n in range(4))).text == "4 nodes: drained"
    assert slurm.parse_nodes("") == slurm.NodesWord("", are_silent=False)


# A node, by an srun that runs its command here.

SRUN = """#!/bin/sh
echo "srun: job 7 queued and waiting for resources" >&2
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_JOB_ID=7 SLURM_JOB_PARTITION=cpu exec UNDER "$@"
"""


@pytest.fixture
def srun(cluster_commands: Path) -> Callable[[str], None]:
    """Puts an srun on PATH that runs its command under another one."""

    def put(under: str = "env") -> None:
        program(cluster_commands / "srun", SRUN.replace("UNDER", under))

    put()
    return put


def test_a_node_is_looked_at_by_one_job(srun: Callable[[str], None], tmp_path: Path) -> None:
    findings = doctor("--node", "long")
    node = socket.gethostname().partition(".")[0]
    assert findings["node job@"].found.startswith(f"job 7 on {node}, partition cpu")
    assert findings["shared directory@"].level == "ok"
    assert findings["locks between nodes@"].level == "ok"
    assert findings["clocks@"].level == "ok"
    assert re.match(r"connected in \d+ ms, a request takes [\d.]+ ms$", findings["route loopback@"].found)
    assert {name for name in findings if name.endswith("@")} >= {f"{check.name}@" for check in MACHINE[:3]}
    assert os.listdir(tmp_path / "home") == ["workspaces"]
    assert os.listdir(tmp_path / "home/workspaces") == []


@as_root
def test_a_state_directory_that_the_node_does_not_see(srun: Callable[[str], None], tmp_path: Path) -> None:
    (tmp_path / "home/here").touch()
    program(tmp_path / "elsewhere", f'#!/bin/sh\nmount -t tmpfs none {tmp_path}/home && exec "$@"\n')
    srun(f"unshare --mount {tmp_path}/elsewhere")
    findings = doctor("--node")
    assert findings["shared directory@"].level == "fail"
    assert "has another directory there" in findings["shared directory@"].found
    assert findings["routes@"].found.startswith("not tried")
    assert os.listdir(tmp_path / "home") == ["here"]


def test_an_interpreter_that_the_node_does_not_have(srun: Callable[[str], None]) -> None:
    finding = doctor("--node", env={"HPC_WORKSPACE_SLURM_PYTHON": "/not/there/python"})["node job"]
    assert finding.level == "fail"
    assert "/not/there/python can't run hpc_workspace there" in finding.found
    assert "SlurmOptions(python=" in finding.remedy


def test_a_job_that_does_not_start_in_time(cluster_commands: Path) -> None:
    program(cluster_commands / "srun", "#!/bin/sh\necho 'srun: job 8 queued' >&2\nexec sleep 60\n")
    finding = doctor("--node", "--queue-timeout", "1s")["node job"]
    assert finding.level == "fail"
    assert "gave no answer within 1 s" in finding.found
    assert "srun: job 8 queued" in finding.found


def test_a_job_that_slurm_refuses(cluster_commands: Path) -> None:
    program(cluster_commands / "srun", "#!/bin/sh\necho 'srun: error: invalid partition specified: x' >&2\nexit 1\n")
    finding = doctor("--node", "x")["node job"]
    assert finding.found == "srun ended with exit code 1. srun: error: invalid partition specified: x"
    assert finding.remedy.startswith("`sinfo -s` lists the partitions")


def test_what_srun_says_is_told_by_its_first_error_and_with_what_helps() -> None:
    """As srun 24.11 said it of a node whose munge was stopped."""
    said = (
        "srun: error: slurm_receive_msgs: [[n03]:41498] failed: Zero Bytes were transmitted or received\n"
        "srun: error: Application launch failed: Zero Bytes were transmitted or received\n"
        "srun: Job step aborted\n"
    )
    assert pick_line(said).startswith("srun: error: slurm_receive_msgs")
    assert "munge" in find_remedy(said)
    assert (pick_line(""), find_remedy("")) == ("", "")


def test_setup_lines_come_before_the_nodes_half() -> None:
    argv = build_argv(
        SlurmOptions(partition="gpu", account="phys", setup=["module load apptainer"], python="/v/python")
    )
    assert argv[:3] == ["srun", "--partition=gpu", "--job-name=hpcws-doctor"]
    assert "--account=phys" in argv
    script = '{\nmodule load apptainer\n} < /dev/null\nexec -- "$@"'
    assert argv[-7:] == ["/bin/bash", "-c", script, "bash", "/v/python", "-m", "hpc_workspace.doctor"]


# Routes and recommendations, as values.

LOST = TunnelError("No SSH.", node="n99", evidence="first\nlast", remedy="Try: ssh -v n99 true")


def test_a_route_that_fails_before_one_that_works_is_a_warning_and_after_it_no_matter() -> None:
    tried = [
        Tried("loopback", 0, error=LOST),
        Tried("a", 1, error=LOST),
        Tried("b", 2, 0.02, 0.001),
        Tried("c", 1, error=LOST),
    ]
    findings = judge_routes(tried, "n99")
    assert [finding.level for finding in findings] == ["ok", "warn", "ok", "ok"]
    assert findings[0].found == "not from here: n99 is another machine"
    assert findings[1].found == "No SSH. last"
    assert findings[1].remedy == "Try: ssh -v n99 true Until then b is used."
    assert findings[2].found == "connected in 20 ms, a request takes 1.0 ms"


def test_a_route_that_others_hold_up_is_recommended() -> None:
    findings = judge_routes([Tried("a", 20, error=LOST), Tried("b", 1, 0.5, 0.001)], "n99")
    assert findings[1].level == "warn"
    assert findings[1].recommends == {"workspace.connect": "b"}


def test_no_route_is_a_failure_of_each() -> None:
    assert {f.level for f in judge_routes([Tried("a", 1, error=LOST), Tried("b", 1, error=LOST)], "n99")} == {"fail"}


def test_what_is_recommended_is_a_configuration_file_that_holds(tmp_path: Path) -> None:
    findings = [
        Finding.of("one", "", warn("seen\nhere", "", recommends={"slurm.partition": "a \"b\" \\ ü"})),
        Finding.of("two", "", warn("not", "", recommends={"workspace.cache_dir": "/x", "slurm.requeue": True})),
        Finding.of("three", "", ok("there", recommends={"workspace.cache_dir": "/y", "slurm.setup": ["module load a"]}), "n1"),
    ]  # fmt: skip
    text = advice.format_config(findings)
    assert "# three on n1: there" in text
    assert advice.save(text) == tmp_path / "config/hpc-workspace/config.toml"
    os.environ.pop("HPC_WORKSPACE_CACHE")
    settings = load_settings()
    assert settings.workspace.cache_dir == "/y"
    assert (settings.slurm.partition, settings.slurm.requeue) == ('a "b" \\ ü', True)
    assert settings.slurm.setup == ["module load a"]
    with pytest.raises(ConfigError, match="is there already"):
        advice.save(text)


def test_nothing_recommended_is_no_file() -> None:
    assert advice.format_config([Finding.of("one", "", fail("broken", "mend it"))]) == ""


# The command.


def _run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpc_workspace.cli", "doctor", *arguments],
        capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=120, check=False,
    )  # fmt: skip


def test_the_lines_say_level_check_and_finding_and_then_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "home").chmod(0o777)
    ended = _run()
    assert ended.returncode == 1
    lines = ended.stdout.splitlines()
    assert any(re.match(r"ok +python +3\.", line) for line in lines)
    (at,) = (i for i, line in enumerate(lines) if line.startswith("fail: state directory: "))
    assert lines[at + 1].startswith("  Client and node find each other through it")
    assert lines[at + 2] == f"  chmod go-w {tmp_path}/home"
    assert ended.stderr == ""


def test_save_writes_the_settings_that_fit_and_a_second_time_refuses(cluster_commands: Path, tmp_path: Path) -> None:
    saved = _run("--save")
    file = tmp_path / "config/hpc-workspace/config.toml"
    assert f"saved as {file}" in saved.stderr
    assert load_settings().slurm.partition == "long"
    assert "The settings that hold fit" in _run().stdout
    file.write_text("")
    again = _run("--save")
    assert again.returncode == 255
    assert "is there already" in again.stderr
    assert file.read_text() == ""


def test_a_queue_timeout_that_is_none_is_an_error() -> None:
    ended = _run("--queue-timeout", "soon")
    assert ended.returncode == 255
    assert "--queue-timeout 'soon' is not a duration" in ended.stderr


def test_help_loads_nothing_of_the_doctor() -> None:
    code = (
        "import sys, hpc_workspace.cli.commands; "
        "print(*(m for m in sys.modules if m.startswith(('hpc_workspace.doctor', 'rich'))))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == ""
