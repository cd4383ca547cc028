"""The built wheel in a venv of /shared, with the nodes' own Python and without a network on the nodes."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from .base import ClusterError, State, digest, say
from .enter import node_run, require_node
from .rootfs import pip_env, require_node_tree, run_in_tree


def find_wheel(wheel: Path | None, wheel_dir: Path | None) -> Path:
    """The one wheel that the arguments name.

    Raises:
        ClusterError: none, or more than one.
    """
    found = [wheel] if wheel else sorted(wheel_dir.glob("hpc_workspace-*.whl")) if wheel_dir else []
    if len(found) != 1 or not found[0].is_file():
        raise ClusterError(f"name one wheel of hpc-workspace (python3 -m build --wheel); found {len(found)}")
    return found[0]


def install(state: State, wheel: Path | None, wheel_dir: Path | None, extras: list[str], *, venv: str = "venv") -> None:
    """Make or refresh /shared/VENV; a few seconds where only the wheel itself is new."""
    found = find_wheel(wheel, wheel_dir)
    key = digest(*_requirements(found, extras), *extras)
    wheels = state.cache / f"wheels-{key}"
    log = state.cache / "install.log"
    log.unlink(missing_ok=True)
    login = require_node(state, "login")
    if not (wheels / "complete").exists():
        _download(state, found, extras, wheels, log)
    shelf = state.shared / "wheels"
    shelf.mkdir(mode=0o755, parents=True, exist_ok=True)
    for file in [*wheels.glob("*.whl"), found]:
        if not (shelf / file.name).exists() or file == found:
            shutil.copy(file, shelf / file.name)
            (shelf / file.name).chmod(0o644)
    home = f"/shared/{venv}"
    pip = [f"{home}/bin/pip", "install", "--no-index", "--find-links=/shared/wheels", "--quiet"]
    marker = state.shared / venv / f".installed-{key}"
    if not marker.exists():
        say(f"making {home}")
        node_run(login, ["rm", "-rf", home], log=log)
        node_run(login, ["python3", "-m", "venv", home], log=log)
        name = f"/shared/wheels/{found.name}" + (f"[{','.join(extras)}]" if extras else "")
        node_run(login, [*pip, name], log=log)
        marker.touch()
    else:
        node_run(login, [*pip, "--no-deps", "--force-reinstall", f"/shared/wheels/{found.name}"], log=log)


def _requirements(wheel: Path, extras: list[str]) -> list[str]:
    """What the wheel needs, with these extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = [line for line in lines if line.startswith("Requires-Dist:")]
    return [line for line in wanted if "extra ==" not in line or any(f"extra == '{name}'" in line for name in extras)]


def _download(state: State, wheel: Path, extras: list[str], wheels: Path, log: Path) -> None:
    """All wheels that the nodes' Python needs, made in a chroot of their tree: there, pip chooses what fits.

    Not `pip download --python-version`: it evaluates the markers for the host's Python, and it refuses the few pure
    Python packages that exist as source only.
    """
    say("downloading the wheels for the nodes")
    wheels.mkdir(parents=True, exist_ok=True)
    shutil.copy(wheel, wheels / wheel.name)
    name = f"/mnt/{wheel.name}" + (f"[{','.join(extras)}]" if extras else "")
    argv = ["python3", "-m", "pip", "wheel", "--wheel-dir=/mnt", "--find-links=/mnt", name]
    run_in_tree(require_node_tree(state), argv, log=log, env=pip_env(), binds={wheels: "/mnt"})
    (wheels / wheel.name).unlink()
    (wheels / "complete").touch()
