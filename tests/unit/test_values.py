"""Values: options, errors, commands' argv and parsers. No process, no socket."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

import hpc_workspace
from hpc_workspace import SlurmOptions, apptainer, errors
from hpc_workspace.client import supervising
from hpc_workspace.errors import ConfigError, SubmitError, WorkspaceError
from hpc_workspace.launch import slurm, slurm_commands
from hpc_workspace.options import WorkspaceOptions, parse_duration_s
from tests.conftest import skip_or_fail

NASTY = ['a"=0"', "a'; echo foo", "$(touch /tmp/x)", "a b", "ü", "`id`", "%j"]


def test_the_public_names_are_these() -> None:
    assert hpc_workspace.__all__ == [
        "ApptainerWorkspace", "Workspace", "SlurmOptions", "CommandResult", "FileOperationResult", "WorkspaceError",
        "__version__",
    ]  # fmt: skip
    assert all(getattr(hpc_workspace, name) for name in hpc_workspace.__all__)


@pytest.mark.parametrize(
    ("options", "option", "said"),
    [
        ({"sif": "x"}, "sif", "has no option 'sif'"),
        ({"sif_file": "x", "image": "y"}, "", "exactly one of"),
        ({}, "", "exactly one of"),
        ({"runtime": "process", "image": "y"}, "", "runs no image"),
        ({"image": "y", "working_dir": "here"}, "", "must be absolute"),
        ({"image": "y", "host_port": 0}, "host_port", "host_port"),
        ({"image": "y", "idle_timeout": "soon"}, "idle_timeout", "not a duration"),
        ({"image": "a\nb"}, "image", "control character"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], option: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        WorkspaceOptions(**options)
    assert caught.value.option == option


@pytest.mark.parametrize("time", ["30", 30, "1:30", "01:00:00", "2-12", "2-12:00", "2-12:00:00"])
def test_sbatchs_times_are_taken(time: str | int) -> None:
    assert SlurmOptions(time=time).time == str(time)


@pytest.mark.parametrize(
    "values", [{"time": "soon"}, {"mem": "4 GB"}, {"mem": "1G", "mem_per_cpu": "1G"}, {"comment": "a\nb"}]
)
def test_a_wrong_slurm_option_is_a_config_error(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        SlurmOptions(**values)


@pytest.mark.parametrize(("text", "seconds"), [("15min", 900), ("90s", 90), ("2h", 7200), (5, 5), (None, None)])
def test_durations(text: str | int | None, seconds: float | None) -> None:
    assert parse_duration_s(text) == seconds


def test_every_error_pickles_whole() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, WorkspaceError)]
    assert len(kinds) > 20
    for kind in kinds:
        error = kind("what", evidence="evidence", remedy="remedy")
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
        assert type(copy) is kind
        assert copy.__dict__ == error.__dict__
        assert str(copy) == "what\nevidence\nremedy"


@pytest.mark.parametrize("value", NASTY)
def test_options_reach_sbatch_as_argv_word_for_word(value: str) -> None:
    argv = slurm_commands.build_sbatch_argv(
        SlurmOptions(comment=value, exclusive=True, extra={"wckey": value, "spread-job": None}),
        name="n", directory="/d", script="/d/s", log="node.log", exported=["HOME"],
    )  # fmt: skip
    assert f"--comment={value}" in argv
    assert f"--wckey={value}" in argv
    assert "--exclusive" in argv
    assert "--spread-job" in argv
    assert "--output=node.log" in argv
    assert "--export=HOME" in argv
    assert argv[-1] == "/d/s"


@pytest.mark.parametrize("value", NASTY)
def test_the_batch_script_survives_every_path(value: str, tmp_path: Path) -> None:
    from hpc_workspace import processes

    script = slurm.render_batch_script(
        slurm.find_template(None), options=SlurmOptions(python="echo"), directory=f"/home/{value}"
    )
    path = tmp_path / "script"
    path.write_text(script)
    assert processes.run(["bash", str(path)], timeout_s=10).stdout == f"-m hpc_workspace.node /home/{value}\n"


def test_the_batch_script_is_this() -> None:
    script = slurm.render_batch_script(
        slurm.find_template(None),
        options=SlurmOptions(python="/usr/bin/python3", setup=["module load apptainer"]),
        directory="/d",
    )
    assert script.splitlines() == [
        "#!/bin/bash",
        "# One workspace of hpc-workspace. All options of the job are on sbatch's command line.",
        "module load apptainer",
        "# exec: Slurm signals the batch shell, which must be the node program itself.",
        "exec -- /usr/bin/python3 -m hpc_workspace.node /d",
    ]


@pytest.mark.parametrize("setup", [[], ["module load apptainer", "export TMPDIR=/scratch/$USER"]])
def test_shellcheck_finds_nothing_in_the_batch_script(setup: list[str], tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        skip_or_fail("there is no shellcheck (Debian: apt-get install shellcheck)")
    options = SlurmOptions(python="/opt/my python", setup=setup)
    path = tmp_path / "script"
    path.write_text(slurm.render_batch_script(slurm.find_template(None), options=options, directory="/home/a b"))
    found = subprocess.run(["shellcheck", "--severity=style", str(path)], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0)


def test_a_template_with_an_unknown_name_is_a_config_error(tmp_path: Path) -> None:
    template = tmp_path / "own.j2"
    template.write_text("{{ nosuch }}")
    with pytest.raises(ConfigError, match="broken"):
        slurm.render_batch_script(template, options=SlurmOptions(), directory="/d")


def test_parse_sbatch_finds_the_id_after_a_sites_own_lines() -> None:
    assert slurm_commands.parse_sbatch("Welcome!\n4211;alpha\n") == "4211"
    with pytest.raises(SubmitError):
        slurm_commands.parse_sbatch("Welcome!")


def test_parse_squeue_reads_all_jobs_and_no_noise() -> None:
    line = "\x1f".join(["7", "RUNNING", "n01", "None", "2026-01-01T00:00:00"])
    found = slurm_commands.parse_squeue(f"{line}\nslurm: noise\n")
    assert list(found) == ["7"]
    assert found["7"].node == "n01"
    assert not found["7"].is_final


@pytest.mark.parametrize(
    "state", ["SUSPENDED", "CONFIGURING", "STOPPED", "RESIZING", "REQUEUE_HOLD", "STAGE_OUT", "NEW_WORD"]
)
def test_a_state_that_is_no_end_or_unknown_is_not_final(state: str) -> None:
    assert not slurm_commands.JobStatus("1", state).is_final


def test_parse_sacct_tells_cancelled_apart_from_by_whom() -> None:
    status = slurm_commands.parse_sacct("7|CANCELLED by 1000|n01|None\n")
    assert status is not None
    assert (status.state, status.reason, status.node) == ("CANCELLED", "1000", "n01")


def test_slurms_commands_get_no_variable_of_a_surrounding_job() -> None:
    kept = slurm_commands.strip_environment(
        {"SLURM_JOB_ID": "1", "SBATCH_PARTITION": "x", "SLURM_CONF": "c", "PATH": "p"}
    )
    assert kept == {"SLURM_CONF": "c", "PATH": "p"}


def test_no_value_of_the_environment_is_on_the_containers_argv() -> None:
    own = apptainer.read_own_environment({"APPTAINER_ENCRYPTION_PASSPHRASE": "s3cret", "X": "y"})
    host = {"PATH": "p", "AWS_KEY": "k", "APPTAINER_BINDPATH": "/"}
    environment = apptainer.build_environment("apptainer", host, {"A": "1,2\n"}, "/t", own)
    assert environment == {
        "PATH": "p", "APPTAINER_TMPDIR": "/t", "APPTAINERENV_A": "1,2\n", "APPTAINER_ENCRYPTION_PASSPHRASE": "s3cret",
    }  # fmt: skip


def test_a_mount_survives_colons_and_commas() -> None:
    assert (
        apptainer.format_mount(apptainer.Mount("/a:b,c", "/d", read_only=True))
        == 'type=bind,"source=/a:b,c",destination=/d,ro'
    )


@pytest.mark.parametrize("value", NASTY)
def test_a_supervised_command_is_the_command(value: str, tmp_path: Path) -> None:
    from hpc_workspace import processes

    text = supervising.supervised(
        'printf %s "$X"; cat', command_id=uuid.uuid4().hex, cwd=str(tmp_path), env={"X": value}, is_told=True
    ).replace(supervising.FOLDER, f"{tmp_path}/run")
    assert processes.run(["sh", "-c", text], timeout_s=10).stdout == value


# Each was printed by Apptainer 1.4.5 on a node where that could not be done.
SAID = {
    "use_fakeroot": [
        "\x1b[91mERROR  : 'newgidmap' execution failed. Check that 'newgidmap' is setuid root or has setcap cap_setgid+eip.\x1b[0m",
        "FATAL:   newuidmap was not found in PATH (/usr/bin), required with fakeroot and unprivileged installation when user is in /etc/subuid",
        "FATAL:   could not use fakeroot: no mapping entry found in /etc/subgid for tester",
    ],
    "writable": [
        "FATAL:   overlay images requires 'enable overlay', but set to 'no' by administrator",
        "FATAL:   --writable-tmpfs requires 'enable overlay', but set to 'no' by administrator",
        "FATAL:   container creation failed: mount hook function failure: hook function for tag prelayer returns error: setup of overlay upper dir failed: failed to create /x: read-only file system",
    ],
    "": [
        "\x1b[31mERROR  : Failed to create user namespace: maximum number of user namespaces exceeded, check /proc/sys/user/max_user_namespaces\x1b[0m",
        "\x1b[31mERROR  : Failed to create container process: No space left on device\x1b[0m",
        "FATAL:   While checking container encryption: required option --passphrase or --pem-path missing",
        "FATAL:   container creation failed: open /etc/resolv.conf: no such file or directory",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("option", "line"), [(option, line) for option, lines in SAID.items() for line in lines])
def test_the_runtimes_last_words_name_the_option_to_blame(option: str, line: str) -> None:
    cause = apptainer.find_cause(f"a line before\nWARNING: overlay, newuidmap\n{line}\n")
    assert cause is not None
    assert cause.option == option
    assert cause.remedy
    assert "\x1b" not in cause.said


def test_a_servers_own_words_are_no_cause() -> None:
    assert apptainer.find_cause("Traceback: overlay newuidmap gocryptfs\nINFO: could not use fakeroot") is None


def test_a_workspace_that_was_not_started_travels_as_its_options() -> None:
    one = hpc_workspace.ApptainerWorkspace(image="x.sif", slurm=SlurmOptions(partition="cpu"), idle_timeout="5min")
    assert pickle.loads(pickle.dumps(one)).options == one.options  # noqa: S301 - our own bytes
