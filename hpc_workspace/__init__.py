"""Agent workspaces in Apptainer containers, on this machine or in a Slurm job.

Importing this package loads nothing: each public name is imported on first use, so that a command line stays quick
and the bundled server, which runs inside containers with little beside it, needs none of the client's dependencies.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hpc_workspace.version import __version__

if TYPE_CHECKING:
    from hpc_workspace.errors import WorkspaceError
    from hpc_workspace.options import SlurmOptions
    from hpc_workspace.results import CommandResult, FileOperationResult
    from hpc_workspace.workspace import ApptainerWorkspace, Workspace

__all__ = [
    "ApptainerWorkspace",
    "Workspace",
    "SlurmOptions",
    "CommandResult",
    "FileOperationResult",
    "WorkspaceError",
    "__version__",
]

_HOMES = {
    "ApptainerWorkspace": "hpc_workspace.workspace",
    "Workspace": "hpc_workspace.workspace",
    "SlurmOptions": "hpc_workspace.options",
    "CommandResult": "hpc_workspace.results",
    "FileOperationResult": "hpc_workspace.results",
    "WorkspaceError": "hpc_workspace.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
