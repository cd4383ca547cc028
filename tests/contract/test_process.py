"""The contract, on this machine without a container."""

from __future__ import annotations

import pytest

from hpc_workspace import Workspace
from tests.contract.behaviours import BEHAVIOURS


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_process(workspace: Workspace, name: str) -> None:
    BEHAVIOURS[name](workspace)
