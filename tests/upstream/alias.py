"""A pytest plugin: OpenHands' tests of RemoteWorkspace get `HpcWorkspace`, connected with nothing. See README.md."""

from __future__ import annotations

from typing import Any

import pytest
from openhands.sdk.workspace.remote import base

from hpc_workspace import ApptainerWorkspace
from hpc_workspace.integrations.openhands import HpcWorkspace

_Upstream = base.RemoteWorkspace
_OWN = {
    "execute_command": "commands go through the door, not through _execute",
    "file_upload": "files go through the door, not through _execute",
    "file_download": "files go through the door, not through _execute",
    "file_operations": "files go through the door, not through _execute",
    "git_": "git goes through the door, not through _execute",
    "alive": "it asks through the door, not by urlopen",
}


class HpcWorkspaceOfNothing(HpcWorkspace):
    """Takes what RemoteWorkspace takes, and starts nothing."""

    def __init__(self, **given: Any) -> None:
        _Upstream.__init__(self, **given)
        self._workspace = ApptainerWorkspace(sif_file="of-nothing.sif")

    def close(self) -> None:
        """Nothing was started."""

    cleanup = close


base.RemoteWorkspace = HpcWorkspaceOfNothing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in _OWN.items():
            if name in item.name:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
