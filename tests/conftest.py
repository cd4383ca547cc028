"""What the lanes need, and what happens where it is missing: a named skip, which is a failure with CI=true."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_workspace import ApptainerWorkspace, Workspace
from tests.integration.cluster import Cluster, why_no_cluster

REPO = Path(__file__).parent.parent


def skip_or_fail(reason: str) -> None:
    """A lane that can't run here: named, and never in silence where CI must run it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"with CI=true every lane must run: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The real cluster, up, with its images and the built wheel installed; down again if it was down before."""
    if reason := why_no_cluster():
        skip_or_fail(reason)
    box = Cluster(REPO)
    box.bring_up()
    yield box
    box.leave()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """One that all tests of a module share, on this machine without a container."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_WORKSPACE_HOME", str(tmp_path_factory.mktemp("home")))
        with ApptainerWorkspace(runtime="process") as opened:
            yield opened


@pytest.fixture(autouse=True)
def _private_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a state directory and a store of its own, unless it shares a workspace, which is in its own."""
    if "workspace" in request.fixturenames:
        return
    monkeypatch.setenv("HPC_WORKSPACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HPC_WORKSPACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def pytest_report_header() -> list[str]:
    reason = why_no_cluster()
    return [f"cluster lane: {'cannot run: ' + reason if reason else 'real sbatch, apptainer and sshd'}", sys.version]
