"""Fetching on a partition that has a network: srun's command line, and what becomes of what it says."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from hpc_workspace.config import ImageSettings
from hpc_workspace.errors import ImageError, PrerequisiteError
from hpc_workspace.launch.transfer import build_srun_argv, run_on_partition
from hpc_workspace.options import SlurmOptions
from hpc_workspace.request import resolve_image
from tests.registry import Registry
from tests.unit.images.pulling import at_once, executable, oras, sif

SETTINGS = ImageSettings(fetch_on="transfer")
# Runs the command here, as the node would, with only what --export names; says so first.
SRUN = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/calls"
echo "srun: job 7 queued"
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of an `srun` that is on PATH."""
    executable(tmp_path / "bin" / "srun", SRUN)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return tmp_path / "bin"


def test_the_command_line_is_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    for name in ("USER", "LOGNAME", "LANG", "LC_ALL", "PYTHONPATH", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert build_srun_argv(SETTINGS, SlurmOptions(account="phys", partition="gpu"), ["python", "-m", "x"]) == [
        "srun", "--partition=transfer", "--job-name=hpcws-images", "--nodes=1", "--ntasks=1", "--cpus-per-task=2",
        "--input=none", "--unbuffered", "--export=PATH,HOME,HPC_WORKSPACE_HOME,HPC_WORKSPACE_CACHE", "--account=phys",
        "python", "-m", "x",
    ]  # fmt: skip
    assert "--cpus-per-task=8" in build_srun_argv(ImageSettings(fetch_on="t", convert_cpus=8), None, [])


def test_names_are_exported_and_no_value_is_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "APPTAINER_DOCKER_PASSWORD": "s3cret",
        "DOCKER_AUTH_CONFIG": '{"auths": "s3cret"}',
        "https_proxy": "http://ada:s3cret@proxy:3128",
        "HPC_WORKSPACE_IMAGES_PLAIN_HTTP": "s3cret:5000",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
    }
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    argv = build_srun_argv(SETTINGS, None, ["true"])
    (exported,) = (word.removeprefix("--export=").split(",") for word in argv if word.startswith("--export="))
    assert set(said) & set(exported) == set(said) - {"AWS_SECRET_ACCESS_KEY"}
    assert len(exported) == len(set(exported))
    assert "s3cret" not in " ".join(argv)


def test_an_image_is_fetched_there_and_taken_here(
    r: Registry, root: Path, srun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_FETCH_ON", "transfer")
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_PLAIN_HTTP", r.host)
    r.push_oras("team/app", "1", sif(b"content"))
    said: list[str] = []

    def resolve() -> str:
        return resolve_image(
            oras(r), runtime="auto", store=root, platform="linux/amd64", pull_policy="missing", slurm=None,
            tell=lambda step: None, say=said.append,
        )  # fmt: skip

    paths = at_once([resolve] * 4).join()
    assert len(set(paths)) == 1
    assert Path(str(paths[0])).read_bytes() == sif(b"content")
    assert len((srun / "calls").read_text().splitlines()) == 1
    assert said[0] == "srun: job 7 queued"
    assert f"{oras(r)}: asking {r.host}" in said
    assert len(r.seen("/blobs/")) == 1
    assert resolve() == paths[0]
    assert len((srun / "calls").read_text().splitlines()) == 1


def test_a_job_that_fails_is_an_error_with_its_last_lines(srun: Path, tmp_path: Path) -> None:
    executable(
        tmp_path / "python", "#!/bin/sh\nfor i in $(seq 99); do echo line $i; done; printf '\\033[31mred\\n'; exit 3\n"
    )
    lines: list[str] = []
    with pytest.raises(ImageError, match="The job on partition transfer that was to fetch it failed") as caught:
        run_on_partition(SETTINGS, SlurmOptions(python=str(tmp_path / "python")), ["images"], lines.append)
    assert len(lines) == 101
    assert caught.value.evidence.splitlines() == [*(f"line {i}" for i in range(89, 100)), "[31mred"]
    assert "images pull --here" in caught.value.remedy


def test_a_job_that_fetched_it_to_another_disk_is_told_as_that(
    r: Registry, root: Path, srun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_FETCH_ON", "transfer")
    with pytest.raises(ImageError, match="fetched on another node, and is not here") as caught:
        resolve_image(
            oras(r), runtime="auto", store=root, platform="linux/amd64", pull_policy="missing",
            slurm=SlurmOptions(python="true"), tell=lambda step: None, say=lambda line: None,
        )  # fmt: skip
    assert str(root) in caught.value.remedy


def test_without_srun_that_is_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrerequisiteError, match="srun"):
        run_on_partition(SETTINGS, None, [], lambda line: None)


def test_the_commands_own_interpreter_runs_there_unless_another_is_named(srun: Path) -> None:
    run_on_partition(SETTINGS, None, ["--version"], logging.getLogger(__name__).info)
    assert f" {sys.executable} -m hpc_workspace.cli --version" in (srun / "calls").read_text()
