"""Interactive sessions, on this machine without a container."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpc_workspace import ApptainerWorkspace, Workspace
from tests.contract.terminals import CLAIMS


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_WORKSPACE_HOME", str(tmp_path_factory.mktemp("home")))
        with ApptainerWorkspace(runtime="process") as opened:
            yield opened


@pytest.fixture(autouse=True)
def _private_home() -> None:
    """The module's own state directory is used instead of one for each test."""


@pytest.mark.parametrize("name", CLAIMS)
def test_terminal(workspace: Workspace, name: str) -> None:
    CLAIMS[name](workspace)
