"""How to run an agent server here: from the spec to argv, environment and private files, for each kind and runtime."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpc_workspace import apptainer, processes
from hpc_workspace.errors import ContainerError, PrerequisiteError
from hpc_workspace.node.scratch import Scratch
from hpc_workspace.node.server import Address
from hpc_workspace.record import Spec
from hpc_workspace.server.layout import server_argv

_INSIDE_RUN = "/.hpc-workspace/run"
_INSIDE_CONFIG = "/.hpc-workspace/config.json"
_INSIDE_TOOLBOX = "/.hw"
_RESOLVER_FILES = ("/etc/resolv.conf", "/etc/hosts")
_PROBE_TIMEOUT_S = 60.0
# Where OpenHands' images serve VNC; VSCode's port is told to its server, 8001 is only its default (1.58).
_VNC_PORT = 8002
_VSCODE_PORT = 8001
# From the deepest directory on the way to $1 that exists, links resolved; then what is missing of it.
_FIND_REAL_PATH = (
    'd=$1; r=; until cd "$d" 2>/dev/null; do r=/${d##*/}$r; d=${d%/*}; [ -n "$d" ] || d=/; done; '
    'p=$(pwd -P); printf %s "${p%/}$r"'
)


@dataclass(frozen=True)
class Plan:
    """All that is needed to start the server, and what is true of it once it runs.

    Attributes:
        environment: of the runtime's own process.
        address: where it will listen.
        grace_s: how long it gets between TERM and KILL.
        writable: what of `Spec.writable` this plan gives.
        extra_ports: name and port, inside the container, of what is served beside the agent server.
    """

    argv: list[str]
    environment: dict[str, str]
    cwd: str
    address: Address
    runtime: str
    working_dir: str
    grace_s: float
    writable: str
    extra_ports: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ingredients:
    """What a plan is made from.

    Attributes:
        token: the agent server's key.
        environment: forwarded variables, for the commands.
        runtime_environment: variables for the runtime's own process, such as the passphrase of an encrypted image.
        tag: the variable and value that mark every process of the workspace.
    """

    scratch: Scratch
    token: str = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    runtime_environment: Mapping[str, str] = field(repr=False)
    tag: tuple[str, str]


def make_plan(spec: Spec, given: Ingredients) -> Plan:
    """Decide how to run the server and write its private files.

    Raises:
        PrerequisiteError, ContainerError, ImageError: it can't be run here.
    """
    if spec.runtime == "process":
        return _process_plan(spec, given)
    if spec.image is None:
        raise ContainerError("The spec names no image.")
    _require_visible(spec)
    runtime = apptainer.choose_runtime(spec.runtime)
    return (_bundled_plan if spec.server == "bundled" else _image_plan)(spec, given, runtime)


def _require_visible(spec: Spec) -> None:
    """Make sure that this node sees all that the spec names: on Slurm, paths are the node's.

    Raises:
        ImageError, ContainerError, PrerequisiteError: it does not.
    """
    node = os.uname().nodename
    assert spec.image is not None
    apptainer.require_image(spec.image)
    if spec.mount_dir is not None and not Path(spec.mount_dir).is_dir():
        raise ContainerError(
            f"mount_dir {spec.mount_dir} is not a directory on {node}.",
            remedy="On Slurm, mount_dir must be visible on the compute node.",
        )
    for bind in spec.binds:
        source = bind.partition(":")[0]
        if not Path(source).exists():
            raise ContainerError(
                f"extra_bind_mounts: {source} does not exist on {node}.",
                remedy="On Slurm, paths are the compute node's.",
            )
    if spec.encryption_pem is not None and not Path(spec.encryption_pem).is_file():
        raise ContainerError(f"encryption_pem {spec.encryption_pem} is not a file on {node}.")
    if spec.server == "bundled" and not Path(spec.toolbox or "").is_dir():
        raise PrerequisiteError(
            f"The toolbox {spec.toolbox} is not visible on {node}.",
            remedy="Set cache_dir (or HPC_WORKSPACE_CACHE) to a directory that the compute nodes see.",
        )


def verify_signature(spec: Spec) -> None:
    """Check the image's signature, if the spec asks for it, before anything of the image runs.

    Raises:
        ImageError: it is not signed, not by a key that is trusted, or was changed.
        PrerequisiteError: there is no runtime.
    """
    if spec.verify is False or spec.image is None:
        return
    runtime = apptainer.choose_runtime(spec.runtime)
    argv = apptainer.build_verify_argv(runtime, spec.image, key=None if spec.verify is True else spec.verify)
    try:
        ended = processes.run(argv, timeout_s=_PROBE_TIMEOUT_S * 10)
    except processes.ProgramTimeoutError as error:
        raise apptainer.unverified(spec.image, str(error)) from error
    if ended.returncode != 0:
        raise apptainer.unverified(spec.image, ended.said)


def _process_plan(spec: Spec, given: Ingredients) -> Plan:
    scratch = given.scratch
    # Without a container there is no /workspace: commands start in mount_dir, or in a directory of the scratch.
    working_dir = spec.mount_dir or (str(scratch.workspace) if spec.working_dir == "/workspace" else spec.working_dir)
    config = _write_bundled_config(given, working_dir, str(scratch.tmp))
    inherited = {
        name: os.environ[name] for name in ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ") if name in os.environ
    }
    return Plan(
        argv=[sys.executable, "-m", "hpc_workspace.server", "--uds", str(scratch.server_socket)],
        environment={
            **inherited,
            **_import_path(),
            "HPC_WORKSPACE_SERVER_CONFIG": str(config),
            **given.environment,
            **dict([given.tag]),
        },
        cwd=str(scratch.workspace),
        address=Address(socket_path=str(scratch.server_socket)),
        runtime="process",
        working_dir=working_dir,
        grace_s=0.5,
        writable="none",
    )


def _import_path() -> dict[str, str]:
    """What lets a child of this interpreter find this package, where it is not installed but on PYTHONPATH."""
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


def _write_bundled_config(given: Ingredients, working_dir: str, spool_dir: str) -> Path:
    config = {"session_api_keys": [given.token], "working_dir": working_dir, "spool_dir": spool_dir}
    return given.scratch.write_private(_new_name(), json.dumps(config))


def _new_name() -> str:
    return f"config-{secrets.token_hex(4)}.json"


def _bundled_plan(spec: Spec, given: Ingredients, runtime: apptainer.Runtime) -> Plan:
    config = _write_bundled_config(given, spec.working_dir, "/tmp")  # noqa: S108 - inside, it is the scratch's
    return _container_plan(
        spec,
        given,
        runtime,
        verb="exec",
        extra_mounts=[
            apptainer.Mount(str(spec.toolbox), _INSIDE_TOOLBOX, read_only=True),
            apptainer.Mount(str(config), _INSIDE_CONFIG, read_only=True),
        ],
        command=[*server_argv(_INSIDE_TOOLBOX), "--uds", f"{_INSIDE_RUN}/server.sock"],
        inside={**given.environment, "HPC_WORKSPACE_SERVER_CONFIG": _INSIDE_CONFIG},
        address=Address(socket_path=str(given.scratch.server_socket)),
        grace_s=0.5,
        extra_ports={"vscode": _VSCODE_PORT, "vnc": _VNC_PORT} if spec.extra_ports else {},
    )


def _image_plan(spec: Spec, given: Ingredients, runtime: apptainer.Runtime) -> Plan:
    port = free_port()
    # A fixed port would be one for all workspaces of a node.
    extra_ports = {"vscode": free_port(), "vnc": _VNC_PORT} if spec.extra_ports else {}
    state = f"{_INSIDE_RUN}/state"
    settings = {
        "session_api_keys": [given.token],
        "enable_vscode": spec.extra_ports,
        "bash_events_dir": f"{state}/bash_events",
        "bash_events_retention_seconds": 3600,
        "conversations_path": f"{state}/conversations",
        **({"vscode_port": extra_ports["vscode"]} if extra_ports else {}),
    }
    config = given.scratch.write_private(_new_name(), json.dumps(settings))
    return _container_plan(
        spec,
        given,
        runtime,
        verb="run",
        extra_mounts=[apptainer.Mount(str(config), _INSIDE_CONFIG, read_only=True)],
        command=["--host", "127.0.0.1", "--port", str(port)],
        inside={
            **given.environment,
            "OPENHANDS_AGENT_SERVER_CONFIG_PATH": _INSIDE_CONFIG,
            "OPENHANDS_SUPPRESS_BANNER": "1",
        },
        address=Address(port=port),
        grace_s=2.0,
        extra_ports=extra_ports,
    )


def _container_plan(
    spec: Spec,
    given: Ingredients,
    runtime: apptainer.Runtime,
    *,
    verb: apptainer.Verb,
    extra_mounts: list[apptainer.Mount],
    command: list[str],
    inside: dict[str, str],
    address: Address,
    grace_s: float,
    extra_ports: dict[str, int],
) -> Plan:
    scratch = given.scratch
    if spec.enable_gpu and "CUDA_VISIBLE_DEVICES" in os.environ:
        inside = {"CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"], **inside}
    environment = apptainer.build_environment(
        runtime, os.environ, {**inside, **dict([given.tag])}, str(scratch.private), given.runtime_environment
    )
    container = apptainer.Container(
        image=str(spec.image),
        mounts=[
            apptainer.Mount(str(scratch.run), _INSIDE_RUN),
            # A contained /tmp is a 64 MiB tmpfs by default: too small for an upload's spool. This is the node's disk.
            apptainer.Mount(str(scratch.tmp), "/tmp"),  # noqa: S108 - made 0700 by the scratch
            apptainer.Mount(spec.mount_dir or str(scratch.workspace), "/workspace"),
            # --no-mount bind-paths takes these away, and DNS with them.
            *(apptainer.Mount(path, path, read_only=True) for path in _RESOLVER_FILES if Path(path).exists()),
            *extra_mounts,
        ],
        binds=spec.binds,
        fakeroot=spec.use_fakeroot,
        docker_compat=spec.enable_docker_compat,
        gpu=spec.enable_gpu,
        no_mount=spec.disable_mount_locations,
        overlay=str(scratch.overlay) if spec.writable == "overlay" else None,
        writable_tmpfs=spec.writable == "tmpfs",
        encryption_pem=spec.encryption_pem,
        working_dir="/workspace",
    )
    container = _with_working_dir(spec, given, runtime, container, environment)
    return Plan(
        argv=apptainer.build_container_argv(runtime, verb, container, command),
        environment=environment | dict([given.tag]),
        cwd=str(scratch.path),
        address=address,
        runtime=runtime,
        working_dir=spec.working_dir,
        grace_s=grace_s,
        writable=spec.writable,
        extra_ports=extra_ports,
    )


def _with_working_dir(
    spec: Spec,
    given: Ingredients,
    runtime: apptainer.Runtime,
    container: apptainer.Container,
    environment: Mapping[str, str],
) -> apptainer.Container:
    """The container, so that `working_dir` can be made and written in it.

    Below /workspace and /tmp it can be; root inside can make it anywhere in an overlay. Where neither holds, it is
    either made beforehand in the overlay's upper layer, where it is ours and what the image has there stays visible,
    or, without an overlay, an empty directory of the scratch is bound there.
    """
    path = os.path.normpath(spec.working_dir)
    if any(path == place or path.startswith(f"{place}/") for place in ("/workspace", "/tmp")):  # noqa: S108 - inside
        return container
    if spec.writable == "overlay":
        if not spec.use_fakeroot:
            real = _real_path(path, runtime, container, environment)
            Path(given.scratch.overlay, "upper", real.lstrip("/")).mkdir(parents=True, exist_ok=True)
        return container
    return apptainer.with_mount(container, apptainer.Mount(str(given.scratch.working_dir), path))


def _real_path(
    path: str, runtime: apptainer.Runtime, container: apptainer.Container, environment: Mapping[str, str]
) -> str:
    """`path` in the image, links resolved: a directory put in the place of a link would hide what it links to.

    Raises:
        ContainerError: the image can't say.
    """
    probe = apptainer.without_writes(container)
    argv = apptainer.build_container_argv(runtime, "exec", probe, ["/bin/sh", "-c", _FIND_REAL_PATH, "sh", path])
    try:
        ended = processes.run(argv, timeout_s=_PROBE_TIMEOUT_S, env=environment)
    except processes.ProgramTimeoutError as error:
        raise ContainerError(f"The image can't say where {path} is.", evidence=str(error)) from error
    if ended.returncode != 0 or not ended.stdout.startswith("/"):
        raise ContainerError(
            f"working_dir {path} can't be made in the image without fakeroot.",
            evidence=ended.said,
            remedy="Choose one below /workspace or /tmp, or use_fakeroot=True.",
        )
    return os.path.normpath(ended.stdout)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
