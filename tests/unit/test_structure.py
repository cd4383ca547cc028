"""The house: one adapter for each dependency, arrows down, no client part in the node program."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hpc_workspace"
ADAPTERS = {
    "subprocess": {"processes.py", "server/children.py", "server/commands.py"},  # the server imports nothing of ours
    "paramiko": {"connect/ssh_paramiko.py"},
    # One speaks to agent servers, one to registries; workspace.py: for the type of `client` alone.
    # OpenHands' conversations want a client of httpx's.
    "httpx": {
        "client/__init__.py",
        "client/calls.py",
        "client/transport.py",
        "images/registry.py",
        "workspace.py",
        "integrations/openhands.py",
    },
    "httpcore": {"client/transport.py"},
    "openhands": {"integrations/openhands.py"},
    "filelock": {"locks.py"},
    "jinja2": {"launch/slurm.py"},
    "submitit": {"batch/arrays.py"},
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


MODULES = {str(path.relative_to(PACKAGE)): _imports(path) for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("dependency", ADAPTERS)
def test_a_dependency_is_imported_by_its_adapter_alone(dependency: str) -> None:
    users = {name for name, imports in MODULES.items() if dependency in {i.partition(".")[0] for i in imports}}
    assert users <= ADAPTERS[dependency]


def test_only_the_clock_sleeps() -> None:
    sleepers = {name for name in MODULES if "time.sleep(" in (PACKAGE / name).read_text()}
    assert sleepers == {"clock.py"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("node/")])
def test_the_node_side_imports_nothing_of_the_client_side(name: str) -> None:
    client_side = (
        "hpc_workspace.connect",
        "hpc_workspace.launch",
        "hpc_workspace.client",
        "hpc_workspace.workspace",
        "hpc_workspace.cli",
    )
    assert not [i for i in MODULES[name] if i.startswith(client_side)]


@pytest.mark.parametrize(
    "name",
    [name for name in MODULES if name.startswith(("connect/", "launch/", "workspace", "client", "request", "images"))],
)
def test_the_client_side_imports_nothing_of_the_node_side(name: str) -> None:
    assert not [i for i in MODULES[name] if i.startswith("hpc_workspace.node")]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("server/")])
def test_the_bundled_server_imports_nothing_of_ours(name: str) -> None:
    ours = {i for i in MODULES[name] if i.startswith("hpc_workspace") and not i.startswith("hpc_workspace.server")}
    assert ours <= {"hpc_workspace.version", "hpc_workspace.version.__version__"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import hpc_workspace, sys; print(*(m for m in ('pydantic','httpx','paramiko','submitit','openhands') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
