"""The workspace: what people hold in their hands. Puts the parts together and does nothing of its own beside."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shlex
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from hpc_workspace import clock, exits, processes, rendezvous
from hpc_workspace.apptainer import read_own_environment
from hpc_workspace.config import load_settings
from hpc_workspace.connect.listener import Listener
from hpc_workspace.errors import (
    ContainerError,
    RendezvousError,
    RendezvousTimeoutError,
    WorkspaceError,
)
from hpc_workspace.exchange import Wish, make_token
from hpc_workspace.launch.launched import Launched
from hpc_workspace.link import END_TIMEOUT_S, Link, as_error, close_quietly, require_running
from hpc_workspace.logs import LogFollower
from hpc_workspace.options import SlurmOptions, WorkspaceOptions
from hpc_workspace.record import Record
from hpc_workspace.rendezvous import WorkspaceDirectory
from hpc_workspace.request import make_spec
from hpc_workspace.results import CommandOutput, CommandResult, FileOperationResult, GitChange, GitDiff, OutputChunk

if TYPE_CHECKING:
    import httpx

    from hpc_workspace.client import AgentServerClient
    from hpc_workspace.client.local import Progress
    from hpc_workspace.connect.reverse import Reverse
    from hpc_workspace.connect.streams import DoorStream
    from hpc_workspace.interactive import Session

log = logging.getLogger(__name__)
server_log = logging.getLogger("hpc_workspace.server_log")

# A path here or there; bytes, or lone surrogates, for one that is not UTF-8.
FilePath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_open_workspaces: weakref.WeakSet[Workspace] = weakref.WeakSet()


class Workspace:
    """An agent server somewhere, and a private connection to it.

    Get one from `ApptainerWorkspace(...)` or `Workspace.attach(id)`. It is a context manager: leaving the block
    closes it.
    """

    def __init__(self, directory: WorkspaceDirectory | None) -> None:
        self._directory = directory
        self._host_port: int | None = None
        self._link: Link | None = None
        self._client: AgentServerClient | None = None
        self._listener: Listener | None = None
        self._extra_listeners: dict[str, Listener] = {}
        self._follower: LogFollower | None = None
        self._lock = threading.RLock()
        self._ended: Record | None = None
        self._reverse: list[Reverse] = []
        self.phases_s: dict[str, float] = {}

    def __repr__(self) -> str:
        state = "open" if self._client else "not started" if self._record is None else "closed"
        where = f" on {self._record.node}" if self._record else ""
        return f"<{type(self).__name__} {self._directory.workspace_id if self._directory else '-'} [{state}{where}]>"

    def __reduce__(self) -> tuple[Any, ...]:
        """A workspace travels as its id: the other process attaches to it."""
        return Workspace.attach, (self.id,)

    @classmethod
    def attach(cls, workspace_id: str, *, connect: str = "auto") -> Workspace:
        """The running workspace with this id, in any process, after a crash, or on another login node.

        Raises:
            RendezvousError: there is none, or it has ended.
            TunnelError: it can't be reached.
        """
        directory = rendezvous.require_workspace(workspace_id)
        record = directory.read_record()
        if record is None:
            raise RendezvousTimeoutError(
                f"Workspace {workspace_id} has not published its address yet.",
                remedy=f"See {directory.node_log}, or wait until `hpc-workspace ps` shows it as ready.",
            )
        require_running(directory, record)
        workspace = Workspace(directory)
        workspace._link = Link(directory, _attached(directory, record), launch_id=record.launch_id, connect=connect)
        workspace._connect_to_server(record)
        return workspace

    @staticmethod
    def list() -> list[Record]:
        """The records of this user's workspaces that have published one and have not said that they ended.

        One whose node program was killed is among them; `attach` tells it by its stale heartbeat.
        """
        found = []
        for directory in rendezvous.list_workspaces():
            with contextlib.suppress(RendezvousError, OSError):
                record = directory.read_record()
                if record is not None and not record.is_final:
                    found.append(record)
        return found

    @property
    def id(self) -> str:
        return self._require_dir().workspace_id

    @property
    def node(self) -> str:
        """The short name of the node that it runs on.

        Raises:
            ContainerError: it was never started.
        """
        return self._require_record().node

    @property
    def job(self) -> str | None:
        """Slurm's job id; None on this machine."""
        return self._link.launched.job_id if self._link else None

    @property
    def runtime(self) -> str:
        """What it runs in: apptainer, singularity, or process (no container at all)."""
        return self._require_record().runtime

    @property
    def working_dir(self) -> str:
        """Where commands start, as they see it."""
        return self._require_record().working_dir

    @property
    def notices(self) -> list[str]:  # type: ignore[valid-type]  # the method list hides it
        """What is not as it was asked for, with the reason: a fall-back, a limit that is near. Empty where all is."""
        record = self._require_record()
        with contextlib.suppress(RendezvousError):
            record = self._require_dir().read_record() or record
        return [*record.notices]

    @property
    def time_left_s(self) -> float | None:
        """Seconds until the job's time limit, when it ends whatever runs in it; None: there is no limit that we know.

        Raises:
            RendezvousError: the workspace directory can't be read.
        """
        directory = self._require_dir()
        record = directory.read_record() or self._require_record()
        return None if record.time_left_s is None else max(0.0, record.time_left_s - directory.record_age_s())

    @property
    def api_key(self) -> str:
        """The session key of the agent server."""
        self._require_client()
        return self._require_link().token

    @property
    def host(self) -> str:
        """`http://127.0.0.1:<port>`: the agent server for other people's clients, open to this user only."""
        self._require_client()
        with self._lock:
            if self._listener is None:
                self._listener = self._listen(Wish(want="server"), self._host_port)
            return self._listener.url

    @property
    def extra_ports(self) -> dict[str, Listener]:
        """With the option `extra_ports`: `vscode` and `vnc`, each with `url`, `port` and `close()`; else empty.

        A port that nothing in the workspace listens on refuses its connections. With `host_port`, they are the two
        ports after it.
        """
        self._require_client()
        with self._lock:
            for name in self._require_record().extra_ports:
                if name not in self._extra_listeners:
                    self._extra_listeners[name] = self._listen_for_extra(name, None)
            return dict(self._extra_listeners)

    def _listen_for_extra(self, name: str, host_port: int | None) -> Listener:
        def dial() -> DoorStream:
            wish = Wish(want="port", port=self._require_record().extra_ports[name])
            return self._require_link().dial_for_others(wish)

        return Listener(dial, host_port)

    def _listen(self, wish: Wish, host_port: int | None = None) -> Listener:
        return Listener(lambda: self._require_link().dial_for_others(wish), host_port)

    @property
    def client(self) -> httpx.Client:
        """An HTTP client with the key and the way built in; relative URLs go to the agent server."""
        return self._require_client().http

    @property
    def alive(self) -> bool:
        """Whether the agent server answers now."""
        if self._client is None:
            return False
        from hpc_workspace.client import AgentServerClient, AtOnce

        link, record = self._require_link(), self._require_record()
        # One that waits for nothing: neither for an explanation nor for a job that is requeued.
        with contextlib.closing(
            AgentServerClient(
                AtOnce(link.dial_at_once), api_key=link.token, server=record.server, working_dir=record.working_dir
            )
        ) as probe:
            try:
                probe.health()
            except WorkspaceError:
                return False
        return True

    def health(self) -> dict[str, Any]:
        """What the agent server says of itself.

        Raises:
            ServerError, TunnelError: it does not answer.
        """
        return self._require_client().health()

    def start(self) -> Workspace:
        """Nothing to do: an attached workspace runs already."""
        return self

    def __enter__(self) -> Workspace:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def execute_command(
        self, command: str, cwd: str | None = None, timeout: float | None = 30.0, env: dict[str, str] | None = None
    ) -> CommandResult:
        """Run a shell command to its end, in bash where the image has it, else sh; its stdin is empty.

        It has ended when its shell has: what it left in the background runs on, and holds nothing up. When its time
        is over, all that it started is ended: TERM, a second, KILL.

        Args:
            cwd: where it starts; relative ones begin at `working_dir`, the default.
            timeout: seconds, fractions too; None: it may run for ever.
            env: variables added to the image's own.

        Raises:
            CommandError: it could not be delivered or started.
            ServerError, TunnelError: the server or the way to it is gone.
        """
        return self._require_client().commands.execute(command, cwd=cwd, timeout_s=timeout, env=env)

    def stream_command(
        self,
        command: str,
        cwd: str | None = None,
        timeout: float | None = None,
        env: dict[str, str] | None = None,
    ) -> Iterator[OutputChunk | CommandResult]:
        """A command's output as it comes; the last item is its `CommandResult`, whose texts are empty.

        Args: as `execute_command`.

        Raises: as `execute_command`.
        """
        return self._require_client().commands.stream(command, cwd=cwd, timeout_s=timeout, env=env)

    def start_command(
        self,
        command: str,
        cwd: str | None = None,
        timeout: float | None = None,
        env: dict[str, str] | None = None,
    ) -> str:
        """Start a command that runs on by itself, whether or not a client is there, and return when it runs.

        Args: as `execute_command`.

        Returns:
            Its id, for `get_command_output` and `stop_command`, here or in any process that attaches.

        Raises: as `execute_command`.
        """
        return self._require_client().commands.start(command, cwd=cwd, timeout_s=timeout, env=env)

    def get_command_output(
        self, command_id: str, wait: float | bool = False, since: CommandOutput | None = None
    ) -> CommandOutput:
        """What a started command has printed until now, and how it ended if it has (`exit_code`).

        Args:
            wait: until it ends (True), or at most for so many seconds.
            since: an earlier answer: only what came after that is told.

        Raises:
            UnknownCommandError: there is no such command: another workspace's, or of before a restart of the job.
            SandboxRestarted: Slurm has requeued the job, and the command is gone.
            CommandError: it was killed in such a way that nothing says how it ended.
            ServerError, TunnelError: the server or the way to it is gone.
        """
        wait_s = float("inf") if wait is True else float(wait)
        return self._require_client().commands.output(command_id, wait_s=wait_s, since=since)

    def stop_command(self, command_id: str) -> None:
        """End a started command and all that it started (TERM, a second, KILL), and wait until it has ended.

        One that has ended stays as it is, and so does what it left in the background.

        Raises:
            UnknownCommandError, ServerError, TunnelError: as `get_command_output`.
        """
        self._require_client().commands.stop(command_id)

    def open_session(
        self,
        command: str | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        *,
        terminal: tuple[int, int] | None = None,
        shell: str | None = None,
    ) -> Session:
        """A command that can be talked to while it runs; or, without one, a shell. It ends with its session.

        Args:
            cwd, env: as `execute_command`. On a terminal, `TERM` belongs into `env`.
            terminal: the size, in rows and columns, of a terminal for it to run on; None: stdin, stdout and stderr are
                pipes.
            shell: the program that runs it; None: bash where the image has it, else sh.

        Raises:
            CommandError: it could not be started.
            PrerequisiteError: the image of OpenHands' server has no Python.
            ServerError, TunnelError: the server or the way to it is gone.
        """
        from hpc_workspace.interactive import open_session

        client, link, record = self._require_client(), self._require_link(), self._require_record()
        return open_session(
            command,
            cwd=cwd,
            env=env,
            terminal=terminal,
            shell=shell,
            record=record,
            execute=client.commands.execute,
            dial=link.dial,
            # Of a job that may run again, that would wait for its next life; the session does not come back with it.
            explain=(lambda error, since_s: error) if record.may_restart else link.explain,
        )

    def file_upload(
        self, source_path: FilePath, destination_path: FilePath, *, on_progress: Progress | None = None
    ) -> FileOperationResult:
        """Copy a file or a directory of ours into the workspace, whole or not at all, with modes and times.

        Args:
            source_path: a link here is followed; those within a directory stay links.
            destination_path: the name that it gets, not a directory to put it into; relative ones begin at
                `working_dir`; missing parents are made. A directory that is there keeps what else it holds.
            on_progress: told how many bytes have been moved, and of how many (None: nobody knows).

        Raises:
            FileError: our disk, or the workspace's (`ServerFileError`), says no; `errno` and `path` say what.
            FileChangedError: the source changes all the time.
            ServerError, TunnelError: it did not arrive.
        """
        files = self._require_client().files
        return files.upload(Path(os.fsdecode(source_path)), os.fsdecode(destination_path), on_progress)

    def file_download(
        self, source_path: FilePath, destination_path: FilePath, *, on_progress: Progress | None = None
    ) -> FileOperationResult:
        """Copy a file or a directory of the workspace to ours, whole or not at all, with modes and times.

        Args: as `file_upload`; a link at `destination_path` is replaced by a file, and never followed.

        Raises:
            UnsafeFileError: a directory holds what is not to be had here.
            others: as `file_upload`; ServerFileError with `status` 404: there is no such file.
        """
        files = self._require_client().files
        return files.download(os.fsdecode(source_path), Path(os.fsdecode(destination_path)), on_progress)

    def read_file(self, path: FilePath) -> bytes:
        """The content of a file of the workspace. Raises: as `file_download`."""
        return self._require_client().files.read(os.fsdecode(path))

    def write_file(self, path: FilePath, data: bytes | str, mode: int = 0o644) -> FileOperationResult:
        """Put bytes, or text as UTF-8, into a file of the workspace, whole or not at all. Raises: as `file_upload`."""
        files = self._require_client().files
        return files.write(data.encode() if isinstance(data, str) else data, os.fsdecode(path), mode)

    def upload_pipe(
        self, pipe: BinaryIO, destination_path: FilePath, *, on_progress: Progress | None = None
    ) -> FileOperationResult:
        """Put what comes from a pipe, until its end, into a file of the workspace. Raises: as `file_upload`."""
        return self._require_client().files.upload_pipe(pipe, os.fsdecode(destination_path), on_progress)

    def download_pipe(
        self, source_path: FilePath, pipe: BinaryIO, *, on_progress: Progress | None = None
    ) -> FileOperationResult:
        """Give the content of a file of the workspace to a pipe.

        Raises:
            FileChangedError, FileError: it changed meanwhile: what was given is worth nothing.
            others: as `file_download`.
        """
        return self._require_client().files.download_pipe(os.fsdecode(source_path), pipe, on_progress)

    def is_directory(self, path: FilePath) -> bool:
        """Whether there is a directory at `path`, links followed. Raises: ServerError, TunnelError."""
        return bool(self._require_client().files.is_directory(os.fsdecode(path)))

    def git_changes(self, path: str = ".") -> list[GitChange]:  # type: ignore[valid-type]  # the method list hides it
        """The changed files of the repository at `path`, against its upstream or default branch, else HEAD.

        A file that was renamed is deleted and added; a file that is not tracked and not ignored is added.

        Raises:
            GitError: git failed.
            ServerError, TunnelError: the server or the way to it is gone.
        """
        return self._require_client().git.changes(path)

    def git_diff(self, path: str) -> GitDiff:
        """The file at `path` before and after its changes, as text; a binary file's text is empty or approximate.

        Raises:
            GitError: the file is larger than 1 MiB, or there is and was none.
            ServerError, TunnelError: the server or the way to it is gone.
        """
        return self._require_client().git.diff(path)

    def patch(self, path: str = ".") -> bytes:
        """All that changed against HEAD in the repository at `path` or around it, as one patch, exact to the byte.

        `git apply --index` of it in a fresh clone gives the same tree: binary files, deletions, renames, modes, links,
        and files that are neither tracked nor ignored. Against the empty tree where there is no commit; empty where
        nothing changed. The repository stays as it is, and nothing that its configuration names is run. Of a submodule
        there is the commit that it is at; a repository inside it that is no submodule is left out.

        Raises:
            GitError: there is no repository, no git, or git failed.
            CommandError, ServerError, TunnelError: as `execute_command`.
        """
        return self._require_client().git.patch(path)

    def forward(self, port: int) -> Listener:
        """A port of 127.0.0.1 here for `port` of the workspace; has `url`, `port` and `close()`."""
        self._require_client()
        return self._listen(Wish(want="port", port=port))

    def reverse(self, port: int) -> Reverse:
        """A port inside the workspace for `port` of 127.0.0.1 here, such as a model's endpoint.

        It has `url`, the one seen inside, `port` and `close()`. Only this workspace's own processes can use it, by
        whatever route it is reached.

        Raises:
            TunnelError: the door can't be reached.
        """
        from hpc_workspace.connect.reverse import Reverse

        self._require_client()
        link = self._require_link()
        forward = Reverse(link.dial_for_others, port)
        self._reverse.append(forward)
        return forward

    def logs(self) -> str:
        """What the agent server has printed; empty if it printed nothing, or after a clean close."""
        try:
            return self._require_dir().server_log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def detach(self) -> str:
        """Leave the workspace running, until it is idle for too long. Returns its id, for `attach`.

        Raises:
            TunnelError: its door can't be told; it will end as it would have.
        """
        with self._lock:
            with contextlib.closing(self._require_link().dial(Wish(want="detach"))) as stream:
                stream.wait_granted()
            self.disconnect()
            return self.id

    def disconnect(self) -> None:
        """Leave the workspace as it is, and let go of it: it ends when its last client is gone or it is idle."""
        with self._lock:
            _note_closed(self)
            self._let_go()
            if self._link is not None:
                self._ended = self._link.record
                self._link.disconnect()
                self._link = None

    def close(self) -> None:
        """End the workspace and wait until nothing of it is left. A second call does nothing.

        Raises:
            ContainerError: something is left; it says what.
        """
        with self._lock:
            link = self._link
            if link is None:
                return
            self._let_go()
            gone = link.end()
            # Until here a signal may interrupt us, and the next call, at the latest at exit, does all of it again.
            try:
                self._settle(gone, link.launched)
            finally:
                self._ended = link.record
                self._link = None
                _note_closed(self)

    cleanup = close

    def _settle(self, gone: bool, launched: Launched) -> None:
        """Remove the directory of a workspace that ended well; keep the evidence of one that did not."""
        directory = self._require_dir()
        try:
            record = directory.read_record()
        except RendezvousError:
            record = None
        if not gone:
            raise ContainerError(
                f"Workspace {directory.workspace_id} did not end within {END_TIMEOUT_S:g} s.",
                evidence=f"{launched.describe()}; its directory is {directory.path}.",
                remedy=f"scancel {launched.job_id}" if launched.job_id else "End its node program by hand.",
            )
        if record is not None and record.failure is not None:
            directory.forget_secrets()
            if record.failure.leftovers:
                raise as_error(record)
            log.warning("workspace %s ended badly: %s See %s", record.workspace_id, record.failure.what, directory.path)
            return
        directory.remove()

    def _let_go(self) -> None:
        extra = self._extra_listeners.values()
        for part in (self._follower, self._listener, *extra, *self._reverse, self._client):
            close_quietly(part)
        self._reverse = []
        self._follower = self._listener = self._client = None
        self._extra_listeners = {}

    def _connect_to_server(self, record: Record) -> None:
        """Take the lease by the first route that works, and make the client."""
        from hpc_workspace.client import AgentServerClient
        from hpc_workspace.client.shared import shared_mount

        link = self._require_link()
        began_s = clock.now_s()
        link.connect(record)
        self._client = AgentServerClient(
            link,
            api_key=link.token,
            server=record.server,
            working_dir=record.working_dir,
            mount=shared_mount(record),
        )
        self.phases_s["connect"] = clock.now_s() - began_s

    def _require_client(self) -> AgentServerClient:
        if self._client is None:
            raise ContainerError(f"{self!r} is not open.", remedy="Call start(), or use it in a with block.")
        return self._client

    def _require_link(self) -> Link:
        if self._link is None:
            raise ContainerError(f"{self!r} is not open.", remedy="Call start(), or use it in a with block.")
        return self._link

    @property
    def _record(self) -> Record | None:
        """Of the life that it is in, or of its last one; None if it was never ready."""
        return self._link.record if self._link is not None else self._ended

    def _require_record(self) -> Record:
        if (record := self._record) is None:
            raise ContainerError(f"{self!r} has not been started.", remedy="Call start(), or use it in a with block.")
        return record

    def _require_dir(self) -> WorkspaceDirectory:
        if self._directory is None:
            raise ContainerError("The workspace has not been started.", remedy="Call start().")
        return self._directory


class ApptainerWorkspace(Workspace):
    """A workspace in an Apptainer container of its own, on this machine or, with `slurm=`, in a batch job.

    The options are those of `WorkspaceOptions`. The constructor validates them and starts nothing; `start()` and
    `with` do.

    Raises:
        ConfigError: an option is unknown, malformed or contradicts another.
    """

    def __init__(self, **options: Any) -> None:
        self.options = WorkspaceOptions(**load_settings().fill_in(options))
        super().__init__(None)
        self._host_port = self.options.host_port
        self.on_progress: Callable[[str], None] = log.info

    def __reduce__(self) -> tuple[Any, ...]:
        """One that was not started travels as its options; a started one as its id."""
        if self._directory is not None:
            return super().__reduce__()
        given = {name: getattr(self.options, name) for name in self.options.model_fields_set}
        return _from_options, (type(self), given)

    def start(self) -> ApptainerWorkspace:
        """Launch it and wait until its agent server can be used. A second call does nothing.

        Guarantees: if it raises, nothing runs; the workspace directory is kept if it holds evidence.

        Raises:
            ImageError, PrerequisiteError: what it needs is missing.
            SubmitError, QueueTimeoutError, JobEndedError, SchedulerUnavailableError: about the job.
            ContainerError, ServerNotReadyError: the container or its server did not come up.
            RendezvousError: the state directory can't be used.
            TunnelError: there is no way to the node.
        """
        with self._lock:
            if self._client is not None:
                return self
            began = clock.Deadline(None)
            slurm = self._slurm_options()
            exits.make_orderly()
            _open_workspaces.add(self)
            try:
                self._take_ports()
                spec = make_spec(self.options, slurm=slurm, say=self.on_progress)
                self.phases_s["image"] = began.elapsed_s
                environment = {name: os.environ[name] for name in self.options.forward_env if name in os.environ}
                own = read_own_environment(os.environ)
                self._directory = WorkspaceDirectory.create(spec, make_token(), environment, own)
                self._link = Link(
                    self._directory,
                    self._launch(slurm),
                    launch_id=spec.launch_id,
                    connect=self.options.connect,
                    queue_timeout_s=self.options.queue_timeout,
                    say=lambda text: self.on_progress(text),
                )
                record = self._wait_ready()
                self._connect_to_server(record)
                self._make_working_dir()
                if self.options.detach_logs and server_log.isEnabledFor(logging.INFO):
                    self._follower = LogFollower(self._directory.server_log, server_log, self._directory.workspace_id)
            except BaseException:
                self._undo_start()
                _note_closed(self)
                raise
            for notice in record.notices:
                log.warning("%s: %s", self._directory.workspace_id, notice)
            self.phases_s.update({f"node.{name}": seconds for name, seconds in record.phases_s.items()})
            self.phases_s["start"] = began.elapsed_s
            return self

    def dry_run(self) -> str:
        """What `start` would run, as lines of shell: sbatch's command line and the batch script, or the node program.

        Nothing is started, fetched or written; `ID` stands for the id that the workspace would get.

        Raises:
            ConfigError: the template is broken.
            PrerequisiteError: ours is missing from the installation.
        """
        from hpc_workspace.launch import local
        from hpc_workspace.launch import slurm as slurm_launch

        directory = WorkspaceDirectory(rendezvous.workspaces_dir() / "ID")
        slurm = self._slurm_options()
        if slurm is None:
            return f"{shlex.join(local.build_argv(directory))}\n"
        return str(slurm_launch.make_submission(directory, slurm))

    def __enter__(self) -> ApptainerWorkspace:
        return self.start()

    def _take_ports(self) -> None:
        """Listen on the ports that were asked for, before anything starts.

        Raises:
            PrerequisiteError: one of them is taken.
        """
        port = self._host_port
        if port is None:
            return
        self._listener = self._listen(Wish(want="server"), port)
        if self.options.extra_ports:
            self._extra_listeners = {
                name: self._listen_for_extra(name, port + step) for step, name in enumerate(("vscode", "vnc"), 1)
            }

    def _slurm_options(self) -> SlurmOptions | None:
        if self.options.slurm != "auto":
            return self.options.slurm
        if processes.find_program("sbatch") is None:
            self.on_progress("slurm='auto': there is no sbatch on PATH, using this machine")
            return None
        self.on_progress("slurm='auto': using Slurm")
        return load_settings().fill_in_slurm(SlurmOptions())

    def _launch(self, slurm: SlurmOptions | None) -> Launched:
        from hpc_workspace.launch import local
        from hpc_workspace.launch import slurm as slurm_launch

        began_s = clock.now_s()
        directory = self._require_dir()
        launched: Launched = local.launch(directory) if slurm is None else slurm_launch.submit(directory, slurm)
        self.phases_s["launch"] = clock.now_s() - began_s
        self.on_progress(f"{directory.workspace_id}: {launched.describe()}")
        return launched

    def _wait_ready(self) -> Record:
        # These imports take as long as a good part of the start: do it while the node is busy.
        from hpc_workspace import client as _client  # noqa: F401
        from hpc_workspace.connect import ssh_paramiko

        if self.job is not None and self.options.connect in ("auto", "paramiko"):
            ssh_paramiko.load()

        began_s = clock.now_s()
        record = self._require_link().wait_ready()
        self.phases_s["wait"] = clock.now_s() - began_s
        return record

    def _make_working_dir(self) -> None:
        """The bundled server makes it itself; OpenHands' runs commands where it is told, if that exists."""
        record = self._require_record()
        if record.server == "image" and record.working_dir != "/workspace":
            made = self._require_client().commands.execute(
                f"mkdir -p -- {shlex.quote(record.working_dir)}", cwd="/", timeout_s=30, env=None
            )
            if made.exit_code != 0:
                raise ContainerError(f"{record.working_dir} can't be made in the workspace.", evidence=made.stderr)

    def _undo_start(self) -> None:
        """Leave nothing running after a failed start."""
        self._let_go()
        if self._link is not None:
            if not self._link.end():
                log.error("%s: not gone in time: %s", self.id, self._link.launched.describe())
            self._require_dir().forget_secrets()
            self._link = None
        elif self._directory is not None:
            self._directory.remove()


def _from_options(kind: type[ApptainerWorkspace], options: dict[str, Any]) -> ApptainerWorkspace:
    return kind(**options)


def _attached(directory: WorkspaceDirectory, record: Record) -> Launched:
    from hpc_workspace.launch.local import LocalAttached
    from hpc_workspace.launch.slurm import SlurmLaunched

    return LocalAttached(record) if record.job_id is None else SlurmLaunched(directory, record.job_id, "")


def _note_closed(workspace: Workspace) -> None:
    """There is one workspace less that must not outlive this process."""
    _open_workspaces.discard(workspace)
    if not _open_workspaces:
        exits.make_default_again()


def _forget_after_fork() -> None:
    """A child that was forked has none of its parent's workspaces to end, and dies of a signal as it always did."""
    _open_workspaces.clear()
    exits.make_default_again()


os.register_at_fork(after_in_child=_forget_after_fork)


@atexit.register
def _close_all() -> None:
    """A workspace never outlives the interpreter that started it, unless it was detached."""
    for workspace in list(_open_workspaces):
        try:
            workspace.close()
        except Exception as error:  # noqa: BLE001 - the others are to be closed all the same
            log.error("%s", error)


__all__ = ["ApptainerWorkspace", "Workspace"]
