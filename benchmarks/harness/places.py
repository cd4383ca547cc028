"""What rows are measured in: workspaces, workers, files; made when a row first wants them, cleared away at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness import worker_process
from benchmarks.harness.floors import RawHttp, tcp_socket, unix_socket
from benchmarks.harness.tuned_ssh import TunedForward
from benchmarks.harness.values import NotMeasuredError
from benchmarks.harness.worker import make_file
from benchmarks.harness.worker_process import WorkerError, WorkerProcess
from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace, procfs
from hpc_workspace.errors import WorkspaceError
from hpc_workspace.owner import Owner
from hpc_workspace.record import Record

TINY, SERVER = "/shared/images/tiny.sif", "/shared/images/agent-server.sif"
UPSTREAM_PYTHON = "/shared/venv-openhands/bin/python"
SHARED = "/shared/scratch"
JOB_NODE = "n01"
COMMAND_PATH = "/api/bash/execute_bash_command"
_START_TIMEOUT_S = 180.0
_T = TypeVar("_T")


class Places:
    """The setting of one run on one node. Use as a context manager.

    Attributes:
        directory: 0700, on this node's own disk, for files of the run.
        shared_directory: 0700, on the shared file system.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._made: dict[str, Any] = {}
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hw-bench-")))

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def load() -> float:
        """The machine's load average of one minute."""
        return os.getloadavg()[0]

    @staticmethod
    def now_s() -> float:
        """Seconds on a clock that never jumps."""
        return time.monotonic()

    def _once(self, name: str, make: Callable[[], _T]) -> _T:
        """What `make` gives, made once. What can't be made is not tried again, for each who wants it hears why.

        Raises:
            NotMeasuredError: it can't be made.
        """
        if name not in self._made:
            try:
                self._made[name] = make()
            except (NotMeasuredError, WorkspaceError, WorkerError, OSError) as error:
                self._made[name] = NotMeasuredError(f"{name}: {' '.join(str(error).split())[:300]}")
        made: _T | NotMeasuredError = self._made[name]
        if isinstance(made, NotMeasuredError):
            raise made
        return made

    @cached_property
    def shared_directory(self) -> Path:
        path = Path(tempfile.mkdtemp(prefix="hw-bench-", dir=SHARED))
        self._stack.callback(shutil.rmtree, path, ignore_errors=True)
        return path

    def file(self, mib: int) -> Path:
        """A file of random bytes on this node's own disk, of so many MiB."""
        path = self.directory / f"{mib}MiB"
        make_file(path, mib)
        return path

    # Workspaces.

    @property
    def bundled(self) -> Workspace:
        """A container on this node with the bundled server."""
        return self._once("a workspace with the bundled server", lambda: self._opened(image=TINY))

    @property
    def openhands(self) -> Workspace:
        """A container on this node with OpenHands' server."""
        return self._once(
            "a workspace with OpenHands' server",
            lambda: self._opened(sif_file=SERVER, health_check_timeout=_START_TIMEOUT_S),
        )

    @property
    def job(self) -> Workspace:
        """A job on n01: a container with the bundled server, and `shared_directory` at /workspace."""
        setup = [f"export PYTHONPATH={os.environ.get('PYTHONPATH', '')}"]
        slurm = SlurmOptions(partition="cpu", time="30", cpus_per_task=2, mem="8G", nodelist=JOB_NODE, setup=setup)
        return self._once(
            "a workspace in a job",
            lambda: self._opened(image=TINY, slurm=slurm, mount_dir=str(self.shared_directory)),
        )

    def _opened(self, **options: Any) -> Workspace:
        return self._stack.enter_context(ApptainerWorkspace(**options))

    def by_route(self, route: str) -> Workspace:
        """A client of the job's workspace that reaches it by this route."""

        def make() -> Workspace:
            attached = Workspace.attach(self.job.id, connect=route)
            self._stack.callback(attached.disconnect)
            return attached

        return self._once(f"a client by the route {route}", make)

    # Raw requests, past the door.

    @property
    def raw_bundled_true(self) -> RawHttp:
        """`true` on the bundled server, over its own Unix socket."""
        record = record_of(self.bundled)
        return self._raw("raw POST to the bundled server", lambda: unix_socket(_server_socket(record)), self.bundled)

    @property
    def raw_openhands_true(self) -> RawHttp:
        """`true` on OpenHands' server, over its own port."""
        port = self.openhands_port
        return self._raw("raw POST to OpenHands' server", lambda: tcp_socket("127.0.0.1", port), self.openhands)

    def _raw(self, name: str, connect: Callable[[], Any], workspace: Workspace) -> RawHttp:
        def make() -> RawHttp:
            body = {"command": "true", "timeout": 30, "cwd": workspace.working_dir}
            raw = RawHttp(connect, COMMAND_PATH, body, workspace.api_key)
            self._stack.callback(raw.close)
            return raw

        return self._once(name, make)

    @property
    def openhands_port(self) -> int:
        """The port of 127.0.0.1 on which OpenHands' server itself listens, without the door."""
        record = record_of(self.openhands)
        return self._once("the port of OpenHands' server", lambda: _listening_port(record))

    # Workers.

    @property
    def upstream(self) -> WorkerProcess:
        """OpenHands' client (openhands-sdk's RemoteWorkspace) of OpenHands' server, straight at its port."""

        def make() -> WorkerProcess:
            if not Path(UPSTREAM_PYTHON).exists():
                raise NotMeasuredError(
                    f"{UPSTREAM_PYTHON} is not there; "
                    "`tests/cluster/cluster install DIR --extra openhands --venv venv-openhands` makes it"
                )
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            # Without the second, its import asks the internet for prices of models.
            env |= {"OPENHANDS_SUPPRESS_BANNER": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
            worker = self._stack.enter_context(WorkerProcess([UPSTREAM_PYTHON], env))
            host = f"http://127.0.0.1:{self.openhands_port}"
            self.upstream_version = worker.ask("open_upstream", host=host, key=self.openhands.api_key)["version"]
            return worker

        return self._once("OpenHands' client", make)

    upstream_version: str | None = None

    @property
    def beside(self) -> WorkerProcess:
        """A process of ours on this node."""
        return self._once("a worker", lambda: self._stack.enter_context(worker_process.here()))

    @property
    def starter(self) -> WorkerProcess:
        """A process of ours for bare containers, whose orphans are its own to wait for."""
        return self._once("a worker for bare starts", lambda: self._stack.enter_context(worker_process.here()))

    def client_beside(self, name: str, workspace: Callable[[], Workspace], connect: str) -> WorkerProcess:
        """A process of its own that has attached to a workspace, and does nothing else."""

        def make() -> WorkerProcess:
            worker = self._stack.enter_context(worker_process.here())
            worker.ask("attach", id=workspace().id, connect=connect)
            return worker

        return self._once(f"a client of {name} by {connect}", make)

    @property
    def on_node(self) -> WorkerProcess:
        """A process of ours on the job's node, whose client reaches the workspace over that node's loopback."""

        def make() -> WorkerProcess:
            # Named here, so that it is gone when the worker is, which is before the job ends.
            job_id = self.job.id
            worker = worker_process.on_node(JOB_NODE, os.environ.get("PYTHONPATH", ""))
            self._stack.enter_context(worker)
            worker.ask("make_directory", path=self.node_directory)
            worker.ask("attach", id=job_id, connect="loopback")
            return worker

        return self._once(f"a worker on {JOB_NODE}", make)

    @property
    def node_directory(self) -> str:
        """The run's directory on the job's node; there once `on_node` is."""
        return str(self.directory)

    # What others would use.

    @property
    def tuned_ssh(self) -> TunedForward:
        """`ssh -L` to the server in the job, tuned, and our HTTP client over it."""
        workspace = self.job

        def make() -> TunedForward:
            record = record_of(workspace)
            forward = TunedForward(record, _server_socket(record), workspace.api_key, self.directory)
            self._stack.callback(forward.close)
            return forward

        return self._once("a tuned ssh -L", make)


def record_of(workspace: Workspace) -> Record:
    """The record of a workspace that runs."""
    return workspace._require_record()


def _server_socket(record: Record) -> str:
    # As node.scratch lays it out; with a very long $TMPDIR it is elsewhere, and opening it says so.
    return f"{record.node_scratch}/run/server.sock"


def _listening_port(record: Record) -> int:
    """The `--port` of the server below the node program.

    Raises:
        OSError: there is no such process.
    """
    warden = Owner.parse(record.owner)
    assert warden is not None
    for process in procfs.descendants(warden.pid):
        argv = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if "--port" in argv:
            return int(argv[argv.index("--port") + 1])
    raise OSError("no process of the workspace has a --port")
