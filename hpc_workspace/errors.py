"""Every exception that crosses the edge of this package.

    WorkspaceError
    ├── ConfigError (ValueError)            an option is wrong; nothing was started
    ├── PrerequisiteError (RuntimeError)    a program, a port or an interpreter that is needed is not there
    ├── CommandError                        a command was not delivered, or nobody knows whether it ran
    │   └── UnknownCommandError (LookupError)   the agent server knows no command of that id
    ├── JobError
    │   ├── SubmitError                     sbatch refused
    │   ├── QueueTimeoutError (TimeoutError)
    │   ├── JobEndedError                   the job ended before, or while, it was needed
    │   └── SchedulerUnavailableError (ConnectionError)
    ├── FileError (OSError)                 a file can't be read or written, on this side or in the workspace
    │   ├── FileChangedError                it changed while it was read, again and again
    │   ├── UnsafeFileError                 a directory from a workspace holds what is not to be had: a hard link, `..`
    │   └── ServerFileError (also a ServerResponseError)    the workspace's own file system says no
    ├── ImageError (RuntimeError)           an image that is missing, broken, or can't be pulled
    ├── ContainerError (RuntimeError)       the container or its server did not start, or is gone
    ├── SandboxRestarted                    Slurm requeued the job: the workspace runs anew, its files are gone
    ├── RendezvousError
    │   ├── RendezvousTimeoutError (TimeoutError)
    │   ├── RendezvousCorruptError          a file of the workspace directory can't be trusted
    │   └── RendezvousStaleError            the record is of an earlier life, or its node fell silent
    ├── TunnelError (ConnectionError)
    │   ├── HostKeyError                    the node's host key is unknown or changed
    │   ├── AuthError                       SSH refused us, or a listener could not prove that it is the door
    │   └── TunnelLostError
    └── ServerError
        ├── ServerUnavailableError (ConnectionError)
        ├── ServerNotReadyError (TimeoutError)
        └── ServerResponseError             an answer that is not what the API promises
            └── GitError                    git could not do what was asked: no repository, no git in the image

A message has four parts: what happened to which named thing, the evidence, and what to try. A command that fails is
not an exception: it is a `CommandResult` with an `exit_code`.
"""

from __future__ import annotations

from typing import Any


class WorkspaceError(Exception):
    """The base of all: what happened, the evidence for it, and what to try.

    Args:
        what: what happened to which named thing.
        evidence: state, last answer, log tail or path; may span lines; empty where there is none.
        remedy: what to try; empty where nothing is known.

    Every attribute survives pickling, so that an error can cross a process boundary whole.
    """

    what: str
    evidence: str
    remedy: str

    def __init__(self, what: str, *, evidence: str = "", remedy: str = "") -> None:
        self.what = what
        self.evidence = evidence
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.evidence, self.remedy) if part)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[WorkspaceError], args: tuple[Any, ...], state: dict[str, Any]) -> WorkspaceError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ConfigError(WorkspaceError, ValueError):
    """An option is unknown, malformed or contradicts another; nothing was started. `option` names it."""

    option: str

    def __init__(self, what: str, *, option: str = "", evidence: str = "", remedy: str = "") -> None:
        super().__init__(what, evidence=evidence, remedy=remedy)
        self.option = option


class PrerequisiteError(WorkspaceError, RuntimeError):
    """Something that this machine or the node must have is not there."""


class CommandError(WorkspaceError):
    """A command was not delivered, or nobody knows whether it ran. `command` is its text."""

    command: str

    def __init__(self, what: str, *, command: str = "", evidence: str = "", remedy: str = "") -> None:
        super().__init__(what, evidence=evidence, remedy=remedy)
        self.command = command


class UnknownCommandError(CommandError, LookupError):
    """The agent server knows no command of that id, or no longer. `command_id` is the id."""

    command_id: str

    def __init__(
        self, what: str, *, command_id: str = "", command: str = "", evidence: str = "", remedy: str = ""
    ) -> None:
        super().__init__(what, command=command, evidence=evidence, remedy=remedy)
        self.command_id = command_id


class JobError(WorkspaceError):
    """Something about a Slurm job.

    `job_id` is Slurm's id (empty if there is none yet), `state` Slurm's own word, `node` the node list (empty before
    a start).
    """

    job_id: str
    state: str
    node: str

    def __init__(
        self, what: str, *, job_id: str = "", state: str = "", node: str = "", evidence: str = "", remedy: str = ""
    ) -> None:
        super().__init__(what, evidence=evidence, remedy=remedy)
        self.job_id = job_id
        self.state = state
        self.node = node


class SubmitError(JobError):
    """sbatch refused the job; nothing is queued."""


class QueueTimeoutError(JobError, TimeoutError):
    """The job was still pending after `queue_timeout`; it was cancelled."""


class JobEndedError(JobError):
    """The job ended before the workspace was ready, or under it."""


class SchedulerUnavailableError(JobError, ConnectionError):
    """Slurm did not answer. That says nothing about the job."""


class FileError(WorkspaceError, OSError):
    """A file or directory can't be read or written. `path` names it; `errno` is the system's, 0 where it gave none."""

    path: str

    def __init__(self, what: str, *, path: str = "", errno: int = 0, evidence: str = "", remedy: str = "") -> None:
        super().__init__(what, evidence=evidence, remedy=remedy)
        self.path = path
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError keeps its number where `__dict__` has nothing of it.
        return _rebuild_with_errno, (type(self), self.args, self.__dict__, self.errno)


def _rebuild_with_errno(
    kind: type[FileError], args: tuple[Any, ...], state: dict[str, Any], errno: int | None
) -> WorkspaceError:
    error = _rebuild(kind, args, state)
    assert isinstance(error, FileError)
    error.errno = errno
    return error


class FileChangedError(FileError):
    """A file, or something in a directory, changed while it was read, at every try. Nothing was left of it."""


class UnsafeFileError(FileError):
    """Something in a directory is not to be had. `path` is its name there. Nothing was left of it."""


class ImageError(WorkspaceError, RuntimeError):
    """An image is missing, is not what it claims to be, or can't be fetched."""


class SandboxRestarted(WorkspaceError):
    """Slurm requeued the job, and the workspace runs anew: told once, to each call that it cut off or to the next one.

    `node` is where it runs now, `job_id` Slurm's id, `restart_count` how often the job was restarted, `kept` the
    directory whose content outlived the restart, the option `mount_dir`; None: nothing did.
    """

    node: str
    job_id: str
    restart_count: int
    kept: str | None

    def __init__(
        self,
        what: str,
        *,
        node: str = "",
        job_id: str = "",
        restart_count: int = 0,
        kept: str | None = None,
        evidence: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(what, evidence=evidence, remedy=remedy)
        self.node = node
        self.job_id = job_id
        self.restart_count = restart_count
        self.kept = kept


class ContainerError(WorkspaceError, RuntimeError):
    """The container, or the server in it, did not start or is gone."""


class RendezvousError(WorkspaceError):
    """The workspace directory does not hold what it should."""


class RendezvousTimeoutError(RendezvousError, TimeoutError):
    """No record appeared in time."""


class RendezvousCorruptError(RendezvousError):
    """A file of the workspace directory can't be trusted: its owner, mode, size or content is wrong."""


class RendezvousStaleError(RendezvousError):
    """The record is of an earlier life of the job, or its node stopped touching its heartbeat."""


class TunnelError(WorkspaceError, ConnectionError):
    """The door can't be reached. `node` is where it should be."""

    node: str

    def __init__(self, what: str, *, node: str = "", evidence: str = "", remedy: str = "") -> None:
        super().__init__(what, evidence=evidence, remedy=remedy)
        self.node = node


class HostKeyError(TunnelError):
    """The node's SSH host key is unknown, or not the one that is known."""


class AuthError(TunnelError):
    """SSH refused every key, or the listener could not prove that it is this workspace's door."""


class TunnelLostError(TunnelError):
    """An open connection to the door broke.

    Attributes:
        is_way_made_anew: the whole way had broken, not this connection alone, and there is another by now.
    """

    is_way_made_anew: bool = False


class ServerError(WorkspaceError):
    """The agent server, beyond the door."""


class ServerUnavailableError(ServerError, ConnectionError):
    """The door answered, and no agent server behind it did."""


class ServerNotReadyError(ServerError, TimeoutError):
    """The agent server did not answer in time."""


class ServerResponseError(ServerError):
    """The agent server's answer is an error, or is not what its API promises. `status` is the HTTP status."""

    status: int

    def __init__(self, what: str, *, status: int = 0, evidence: str = "", remedy: str = "") -> None:
        super().__init__(what, evidence=evidence, remedy=remedy)
        self.status = status


class GitError(ServerResponseError):
    """git could not do what was asked. `path` is where, as the workspace sees it; `status` 501: there is no git."""

    path: str

    def __init__(self, what: str, *, path: str = "", status: int = 0, evidence: str = "", remedy: str = "") -> None:
        super().__init__(what, status=status, evidence=evidence, remedy=remedy)
        self.path = path


class ServerFileError(FileError, ServerResponseError):
    """The workspace's file system says no. `status` is the HTTP status: 404 not there, 403 forbidden, 507 full."""

    def __init__(
        self, what: str, *, path: str = "", errno: int = 0, status: int = 0, evidence: str = "", remedy: str = ""
    ) -> None:
        super().__init__(what, path=path, errno=errno, evidence=evidence, remedy=remedy)
        self.status = status
