"""The agent server on its node: how it is started, reached and asked, for each kind and each runtime."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_workspace import apptainer, processes, toolbox
from hpc_workspace.errors import ContainerError, PrerequisiteError
from hpc_workspace.node.identity import Family
from hpc_workspace.node.scratch import Scratch
from hpc_workspace.node.teardown import TAG_NAME
from hpc_workspace.record import Spec

_INSIDE_RUN = "/.hpc-workspace/run"
_INSIDE_CONFIG = "/.hpc-workspace/config.json"
_INSIDE_TOOLBOX = "/.hw"
_RESOLVER_FILES = ("/etc/resolv.conf", "/etc/hosts")
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Address:
    """Where the agent server listens on this node: a Unix socket, or a port of 127.0.0.1."""

    socket_path: str | None = None
    port: int | None = None

    def connect(self, family: Family) -> socket.socket:
        """A connection to the server, after the check that the listener is the container's own.

        Raises:
            OSError: nobody listens.
            NotOursError: somebody else does.
        """
        if self.socket_path is not None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(_CONNECT_TIMEOUT_S)
            try:
                connection.connect(self.socket_path)
                family.require_unix_peer(connection)
            except BaseException:
                connection.close()
                raise
        else:
            assert self.port is not None
            connection = connect_port(self.port, family)
        connection.settimeout(None)
        return connection


def connect_port(port: int, family: Family) -> socket.socket:
    """A connection to 127.0.0.1:port, after the check that the listener is the container's own.

    Raises:
        OSError: nobody listens.
        NotOursError: somebody else does.
    """
    connection = socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_TIMEOUT_S)
    try:
        family.require_tcp_listener(port)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


@dataclass(frozen=True)
class Plan:
    """All that is needed to start the server: argv and environment, and where it will listen."""

    argv: list[str]
    environment: dict[str, str]
    cwd: str
    address: Address
    runtime: str
    working_dir: str
    grace_s: float


def make_plan(spec: Spec, scratch: Scratch, token: str, environment: Mapping[str, str]) -> Plan:
    """Decide how to run the server and write its private files.

    Args:
        environment: forwarded variables, for the commands.

    Raises:
        PrerequisiteError, ContainerError, ImageError: it can't be run here.
    """
    if spec.runtime == "process":
        return _process_plan(spec, scratch, token, environment)
    if spec.image is None:
        raise ContainerError("The spec names no image.")
    apptainer.require_image(spec.image)
    if spec.mount_dir is not None and not Path(spec.mount_dir).is_dir():
        raise ContainerError(
            f"mount_dir {spec.mount_dir} is not a directory on {os.uname().nodename}.",
            remedy="On Slurm, mount_dir must be visible on the compute node.",
        )
    runtime = apptainer.choose_runtime(spec.runtime)
    return (_bundled_plan if spec.server == "bundled" else _image_plan)(spec, scratch, token, environment, runtime)


def _process_plan(spec: Spec, scratch: Scratch, token: str, environment: Mapping[str, str]) -> Plan:
    # Without a container there is no /workspace: commands start in mount_dir, or in a directory of the scratch.
    working_dir = spec.mount_dir or (str(scratch.workspace) if spec.working_dir == "/workspace" else spec.working_dir)
    config = _write_bundled_config(scratch, token, working_dir, str(scratch.tmp))
    inherited = {
        name: os.environ[name] for name in ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ") if name in os.environ
    }
    return Plan(
        argv=[sys.executable, "-m", "hpc_workspace.server", "--uds", str(scratch.server_socket)],
        environment={
            **inherited,
            **_import_path(),
            "HPC_WORKSPACE_SERVER_CONFIG": str(config),
            **environment,
        },
        cwd=str(scratch.workspace),
        address=Address(socket_path=str(scratch.server_socket)),
        runtime="process",
        working_dir=working_dir,
        grace_s=0.5,
    )


def _import_path() -> dict[str, str]:
    """What lets a child of this interpreter find this package, where it is not installed but on PYTHONPATH."""
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


def _write_bundled_config(scratch: Scratch, token: str, working_dir: str, spool_dir: str) -> Path:
    config = {"session_api_keys": [token], "working_dir": working_dir, "spool_dir": spool_dir}
    return scratch.write_private("config.json", json.dumps(config))


def _bundled_plan(
    spec: Spec, scratch: Scratch, token: str, environment: Mapping[str, str], runtime: apptainer.Runtime
) -> Plan:
    if spec.toolbox is None:
        raise ContainerError("The spec names no toolbox for the bundled server.")
    if not Path(spec.toolbox).is_dir():
        raise PrerequisiteError(
            f"The toolbox {spec.toolbox} is not visible on {os.uname().nodename}.",
            remedy="Set cache_dir (or HPC_WORKSPACE_CACHE) to a directory that the compute nodes see.",
        )
    config = _write_bundled_config(scratch, token, spec.working_dir, "/tmp")  # noqa: S108 - made 0700 below
    inside = {
        **environment,
        "HPC_WORKSPACE_SERVER_CONFIG": _INSIDE_CONFIG,
    }
    box = apptainer.Mount(spec.toolbox, _INSIDE_TOOLBOX, read_only=True)
    return _container_plan(
        spec,
        scratch,
        runtime,
        verb="exec",
        extra_mounts=[box, apptainer.Mount(str(config), _INSIDE_CONFIG, read_only=True)],
        command=[*toolbox.toolbox_argv(_INSIDE_TOOLBOX), "--uds", f"{_INSIDE_RUN}/server.sock"],
        inside=inside,
        address=Address(socket_path=str(scratch.server_socket)),
        grace_s=0.5,
    )


def _image_plan(
    spec: Spec, scratch: Scratch, token: str, environment: Mapping[str, str], runtime: apptainer.Runtime
) -> Plan:
    port = _free_port()
    state = f"{_INSIDE_RUN}/state"
    config = scratch.write_private(
        f"config-{secrets.token_hex(4)}.json",
        json.dumps(
            {
                "session_api_keys": [token],
                "enable_vscode": False,
                "bash_events_dir": f"{state}/bash_events",
                "bash_events_retention_seconds": 3600,
                "conversations_path": f"{state}/conversations",
            }
        ),
    )
    inside = {
        **environment,
        "OPENHANDS_AGENT_SERVER_CONFIG_PATH": _INSIDE_CONFIG,
        "OPENHANDS_SUPPRESS_BANNER": "1",
    }
    return _container_plan(
        spec,
        scratch,
        runtime,
        verb="run",
        extra_mounts=[apptainer.Mount(str(config), _INSIDE_CONFIG, read_only=True)],
        command=["--host", "127.0.0.1", "--port", str(port)],
        inside=inside,
        address=Address(port=port),
        grace_s=2.0,
    )


def _container_plan(
    spec: Spec,
    scratch: Scratch,
    runtime: apptainer.Runtime,
    *,
    verb: str,
    extra_mounts: list[apptainer.Mount],
    command: list[str],
    inside: dict[str, str],
    address: Address,
    grace_s: float,
) -> Plan:
    mounts = [
        apptainer.Mount(str(scratch.run), _INSIDE_RUN),
        # A contained /tmp is a 64 MiB tmpfs by default: too small for an upload's spool. This is the node's disk.
        apptainer.Mount(str(scratch.tmp), "/tmp"),  # noqa: S108 - made 0700 below
        apptainer.Mount(spec.mount_dir or str(scratch.workspace), "/workspace"),
        # --no-mount bind-paths takes these away, and DNS with them.
        *(apptainer.Mount(path, path, read_only=True) for path in _RESOLVER_FILES if Path(path).exists()),
        *extra_mounts,
    ]
    container = apptainer.Container(
        image=str(spec.image),
        mounts=mounts,
        binds=spec.binds,
        fakeroot=spec.use_fakeroot,
        docker_compat=spec.enable_docker_compat,
        gpu=spec.enable_gpu,
        no_mount=spec.disable_mount_locations,
        overlay=str(scratch.overlay) if spec.writable == "overlay" else None,
        writable_tmpfs=spec.writable == "tmpfs",
        working_dir="/workspace",
    )
    if spec.enable_gpu and "CUDA_VISIBLE_DEVICES" in os.environ:
        inside = {"CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"], **inside}
    return Plan(
        argv=apptainer.build_container_argv(runtime, "run" if verb == "run" else "exec", container, command),
        environment=apptainer.build_environment(runtime, os.environ, inside, str(scratch.private)),
        cwd=str(scratch.path),
        address=address,
        runtime=runtime,
        working_dir=spec.working_dir,
        grace_s=grace_s,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(plan: Plan, log: Path, tag: str) -> processes.Child:
    """Start the server; its output goes to `log`. `tag` marks its processes for teardown."""
    with log.open("ab") as output:
        return processes.spawn(
            plan.argv, output=output, env={**plan.environment, TAG_NAME: tag.partition("=")[2]}, cwd=plan.cwd
        )


def ask(address: Address, family: Family, path: str, timeout_s: float = 5.0) -> dict[str, object]:
    """The server's answer to a GET that needs no key.

    Raises:
        OSError: nobody answers.
        NotOursError: somebody else listens.
        ValueError: the answer is not JSON with status 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", timeout=timeout_s)
    connection.sock = address.connect(family)
    connection.sock.settimeout(timeout_s)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read(65536)
    except http.client.HTTPException as error:
        raise OSError(f"not an HTTP answer: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"status {response.status}")
    answer = json.loads(body)
    return answer if isinstance(answer, dict) else {}
