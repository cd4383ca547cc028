"""Interactive sessions, on this machine without a container."""

from __future__ import annotations

import pytest

from hpc_workspace import Workspace
from tests.contract.terminals import CLAIMS


@pytest.mark.parametrize("name", CLAIMS)
def test_terminal(workspace: Workspace, name: str) -> None:
    CLAIMS[name](workspace)
