"""The workspace directory: where client side and node side meet, on the shared file system.

    <state dir>/workspaces/<workspace id>/     0700
        spec.json     what was asked for (`record.Spec`)
        token         the session key, 0600
        environment   values of forwarded variables, 0600, NUL-separated; there only if there are any
        runtime_environment   the same for the container's runtime itself, such as an encrypted image's passphrase
        record.json   what became of it (`record.Record`), written aside, then renamed; record.lock beside it
        heartbeat     touched by the node program
        job.sbatch  node.log  server.log

Correctness comes from write-aside and rename, one writer by construction, and the record's fence. The lock only keeps
writers tidy: on file systems where locking fails or lies, nothing but tidiness is lost. What is read is checked as if a
stranger had written it: a regular file, ours, shut to others, of a sane size, of a schema that we know.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from hpc_workspace import clock, files, locks
from hpc_workspace.errors import ConfigError, RendezvousCorruptError, RendezvousError, RendezvousStaleError
from hpc_workspace.record import SCHEMA, SCHEMA_MAX, Record, Spec
from hpc_workspace.text import no_control

_TOKEN = "token"  # noqa: S105 - a file's name
_ENVIRONMENT = "environment"
_RUNTIME_ENVIRONMENT = "runtime_environment"
MAX_BYTES = 256 * 1024
_LOCK_TIMEOUT_S = 5.0
# A workspace whose heartbeat is older than this has probably died.
STALE_S = 120.0
_LOOK_S = (0.01, 0.02)

_Value = TypeVar("_Value", Spec, Record)


def state_dir() -> Path:
    """`$HPC_WORKSPACE_HOME`, else `~/.hpc_workspace`: it must be visible from client and nodes.

    Raises:
        ConfigError: there is no such home, or the path has a control character, which a batch script can't carry.
    """
    try:
        path = Path(os.environ.get("HPC_WORKSPACE_HOME") or "~/.hpc_workspace").expanduser().absolute()
        no_control(str(path))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The state directory can't be used: its path {error}.",
            option="HPC_WORKSPACE_HOME",
            remedy="Set HPC_WORKSPACE_HOME to a directory that you own.",
        ) from error
    return path


def workspaces_dir() -> Path:
    return state_dir() / "workspaces"


def make_private_dir(path: Path) -> None:
    """Make a directory 0700, parents too; one that is there must be ours and no link.

    Raises:
        RendezvousCorruptError: it belongs to somebody else.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RendezvousCorruptError(
            f"{path} is not a directory of yours.", remedy="Set HPC_WORKSPACE_HOME to a directory that you own."
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o700)


class WorkspaceDirectory:
    """One workspace's directory. Holds a path and nothing else: every call looks at the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<WorkspaceDirectory {str(self.path)!r}>"

    @property
    def workspace_id(self) -> str:
        return self.path.name

    @property
    def node_log(self) -> Path:
        return self.path / "node.log"

    @property
    def server_log(self) -> Path:
        return self.path / "server.log"

    @property
    def batch_script(self) -> Path:
        return self.path / "job.sbatch"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat"

    @classmethod
    def create(
        cls, spec: Spec, token: str, environment: dict[str, str], runtime_environment: dict[str, str] | None = None
    ) -> WorkspaceDirectory:
        """Make the directory with its spec, token and environments.

        Guarantees: if it raises, nothing is left of it.

        Raises:
            ConfigError: a path is no UTF-8, or the environment is too large.
            RendezvousError: the state directory can't be written, or has no room.
        """
        root = workspaces_dir()
        directory = cls(root / spec.workspace_id)
        try:
            make_private_dir(root)
            directory.path.mkdir(mode=0o700)
        except OSError as error:
            raise _unwritable(root, error) from error
        try:
            directory._write("spec.json", _as_json(spec).encode())
            directory._write(_TOKEN, token.encode())
            directory._write_variables(_ENVIRONMENT, environment)
            directory._write_variables(_RUNTIME_ENVIRONMENT, runtime_environment or {})
            for log in (directory.node_log, directory.server_log):
                os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except BaseException as error:
            directory.remove()
            if isinstance(error, UnicodeEncodeError):
                raise ConfigError(
                    "A path of the workspace has bytes that are no UTF-8.", evidence=str(error)
                ) from error
            if isinstance(error, OSError):
                raise _unwritable(root, error) from error
            raise
        return directory

    def _write_variables(self, name: str, variables: dict[str, str]) -> None:
        data = "\0".join(f"{key}={value}" for key, value in variables.items()).encode("utf-8", "surrogateescape")
        if len(data) > MAX_BYTES:
            raise ConfigError(
                f"The variables to pass on ({', '.join(variables)}) have {len(data)} bytes: more than {MAX_BYTES}.",
                option="forward_env",
                remedy="Put large values into a file, and upload that.",
            )
        if data:
            self._write(name, data)

    def remove(self) -> None:
        """Remove the directory and all that is in it; nothing happens if it is gone.

        Raises:
            RendezvousError: something of it can't be removed.
        """
        for is_last in (False, True):
            try:
                shutil.rmtree(self.path)
            except FileNotFoundError:
                return
            except OSError as error:  # a late writer, once
                if is_last:
                    raise _unwritable(self.path, error) from error

    def read_spec(self) -> Spec:
        """What was asked for.

        Raises:
            RendezvousCorruptError: it is not there or can't be trusted.
        """
        spec = self._read_model("spec.json", Spec)
        if spec is None:
            raise RendezvousCorruptError(f"{self.path} has no spec.json.", remedy="Was the workspace removed?")
        return spec

    def read_token(self) -> str:
        """The session key.

        Raises:
            RendezvousCorruptError: it is not there (the workspace has ended) or can't be trusted.
        """
        data = self._read(_TOKEN)
        if data is None:
            raise RendezvousCorruptError(f"{self.path} has no token: the workspace has ended.")
        return data.decode("ascii", "replace")

    def read_environment(self) -> dict[str, str]:
        """Names and values of the forwarded variables; empty where there are none."""
        return self._read_variables(_ENVIRONMENT)

    def read_runtime_environment(self) -> dict[str, str]:
        """Names, without the runtime's prefix, and values for the runtime itself; empty where there are none."""
        return self._read_variables(_RUNTIME_ENVIRONMENT)

    def _read_variables(self, name: str) -> dict[str, str]:
        data = self._read(name)
        if not data:
            return {}
        pairs = (pair.partition("=") for pair in data.decode("utf-8", "surrogateescape").split("\0"))
        return {name: value for name, _, value in pairs}

    def read_record(self) -> Record | None:
        """The record, or None while there is none.

        Raises:
            RendezvousCorruptError: it can't be trusted.
            RendezvousStaleError: the whole directory is gone: somebody has closed the workspace.
            RendezvousError: the directory can't be read.
        """
        # NFS caches "no such file" for up to a minute; listing the directory makes it look again.
        if "record.json" not in self._list():
            return None
        return self._read_model("record.json", Record)

    def _list(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError as error:
            raise RendezvousStaleError(
                f"Workspace {self.workspace_id} has ended: its directory is gone.", evidence=str(error)
            ) from error
        except OSError as error:
            raise RendezvousError(f"{self.path} can't be read.", evidence=str(error)) from error

    def record_age_s(self) -> float:
        """How long ago the record was written, by the file server's clock.

        Raises:
            RendezvousError: there is none, or the directory can't be written.
        """
        try:
            return files.age_s(self.path / "record.json")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def wait_record(self, is_wanted: Callable[[Record], bool], *, timeout_s: float) -> Record | None:
        """The record once it is as wanted; None if it is not within `timeout_s`.

        Raises: as `read_record`.
        """
        deadline = clock.Deadline(timeout_s)
        for pause_s in clock.pauses_s(*_LOOK_S):
            record = self.read_record()
            if record is not None and is_wanted(record):
                return record
            if deadline.is_over:
                break
            clock.sleep(pause_s)
        return None

    def publish(self, record: Record) -> None:
        """Put `record` in place, whole or not at all.

        Raises:
            RendezvousStaleError: a later life of the job has published its own, or the directory is gone.
            RendezvousError: the disk is full or gone; the record is too large to be read.
        """
        data = _as_json(record).encode("utf-8", "replace")
        if len(data) > MAX_BYTES:
            raise RendezvousError(f"The record of {record.workspace_id} is too large ({len(data)} bytes).")
        self._list()  # a lock would make a directory that is gone again
        try:
            with locks.tidily(self.path / "record.lock", _LOCK_TIMEOUT_S):
                self.require_no_later_life(record)
                self._write("record.json", data)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def require_no_later_life(self, record: Record) -> None:
        """Make sure that `record` is of the job's last life.

        Raises:
            RendezvousStaleError: it is not.
        """
        with contextlib.suppress(RendezvousCorruptError):  # what is broken is replaced
            found = self.read_record()
            if found is not None and found.fence > record.fence:
                raise RendezvousStaleError(
                    f"Workspace {record.workspace_id} has a later life on {found.node} (job {found.job_id}, restart "
                    f"{found.restart_count}): this one is over."
                )

    def forget_secrets(self) -> None:
        """Remove the key and the forwarded values: nothing can reach this workspace any more."""
        for name in (_TOKEN, _ENVIRONMENT, _RUNTIME_ENVIRONMENT):
            (self.path / name).unlink(missing_ok=True)

    def write_batch_script(self, text: str) -> None:
        """Put the batch script beside the rest.

        Raises:
            RendezvousError: the disk is full or gone.
        """
        try:
            self._write("job.sbatch", text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def touch_heartbeat(self, idle_s: float = 0.0) -> None:
        """Set the heartbeat's time to now, by the file server's clock.

        Args:
            idle_s: for how long the workspace has been idle; kept as the difference of the file's two times.
        """
        descriptor = os.open(self.heartbeat, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            os.utime(descriptor)
            if idle_s >= 1.0:
                now_ns = os.fstat(descriptor).st_mtime_ns
                os.utime(descriptor, ns=(now_ns - int(idle_s * 1e9), now_ns))
        finally:
            os.close(descriptor)

    def heartbeat_age_s(self) -> float | None:
        """How old the heartbeat is, by the file server's clock, or None if there never was one.

        Raises:
            RendezvousError: the directory can't be written, as a look at that clock needs.
        """
        try:
            return files.age_s(self.heartbeat)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def idle_s(self) -> float | None:
        """For how long the workspace has been idle, as of its last heartbeat; None if there never was one."""
        try:
            found = self.heartbeat.stat()
        except OSError:
            return None
        return max(0.0, found.st_mtime - found.st_atime)

    def has_ended(self) -> bool:
        """Whether the record says so, or the directory is gone."""
        try:
            record = self.read_record()
        except RendezvousError:
            return True
        return record is not None and record.is_final

    def has_token(self) -> bool:
        """Whether there is a key, as long as the workspace has not ended for good."""
        return (self.path / _TOKEN).exists()

    def log_tail(self, path: Path, lines: int = 12) -> str:
        """The last lines of a log, without control characters; empty if there is none."""
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - 16 * 1024))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return ""
        kept = ("".join(c for c in line if c.isprintable() or c == "\t") for line in text.splitlines())
        return "\n".join([line for line in kept if line.strip()][-lines:])

    def _write(self, name: str, data: bytes) -> None:
        files.write_whole(self.path / name, data)

    def _read(self, name: str) -> bytes | None:
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RendezvousCorruptError(f"{path} can't be opened.", evidence=str(error)) from error
        if wrong := _distrust(os.fstat(descriptor)):
            os.close(descriptor)
            raise RendezvousCorruptError(
                f"{path} {wrong}: it is not trusted.", remedy="Somebody changed it; end the workspace."
            )
        with os.fdopen(descriptor, "rb") as file:
            return file.read(MAX_BYTES + 1)

    def _too_new(self, name: str, schema: int) -> RendezvousCorruptError:
        return RendezvousCorruptError(
            f"{self.path / name} has schema {schema}, newer than {SCHEMA}.",
            remedy="Use the version of hpc-workspace that made it.",
        )

    def _read_model(self, name: str, model: type[_Value]) -> _Value | None:
        data = self._read(name)
        if data is None:
            return None
        try:
            value = model.model_validate_json(data)
        except ValidationError as error:
            if newer := _newer_schema(data):
                raise self._too_new(name, newer) from error
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])[:100]
            raise RendezvousCorruptError(
                f"{self.path / name} is not valid.", evidence=f"{where}: {first['msg']}" if where else first["msg"]
            ) from error
        if value.schema_version > SCHEMA:
            raise self._too_new(name, value.schema_version)
        if getattr(value, "workspace_id", self.workspace_id) != self.workspace_id:
            raise RendezvousCorruptError(f"{self.path / name} is of another workspace.")
        return value


def _as_json(value: BaseModel) -> str:
    """`value` for a file; characters that UTF-8 does not have are left to whoever encodes it."""
    return json.dumps(value.model_dump(), indent=1, ensure_ascii=False)


def _distrust(found: os.stat_result) -> str:
    """Why a file of the workspace directory is not to be trusted; empty if it is."""
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):04o})"
    if found.st_size > MAX_BYTES:
        return f"is too large ({found.st_size} bytes)"
    return ""


def _newer_schema(data: bytes) -> int | None:
    try:
        schema = json.loads(data).get("schema_version")
    except (ValueError, AttributeError, RecursionError):
        return None
    return schema if isinstance(schema, int) and SCHEMA < schema < SCHEMA_MAX else None


def _unwritable(path: Path, error: OSError) -> RendezvousError:
    return RendezvousError(
        f"{path} can't be written.",
        evidence=str(error),
        remedy="Free some space there, or set HPC_WORKSPACE_HOME to a directory on a shared disk with room.",
    )


def paths_in_use() -> list[Path]:
    """Images and toolboxes of this user's workspaces that have not said that they ended."""
    found = []
    for directory in list_workspaces():
        try:
            record = directory.read_record()
        except (RendezvousError, OSError):  # it may live: of a later version, say
            record = None
        if record is None or not record.is_final:
            with contextlib.suppress(RendezvousError, OSError):
                spec = directory.read_spec()
                found += [Path(path) for path in (spec.image, spec.toolbox) if path]
    return found


def require_workspace(workspace_id: str) -> WorkspaceDirectory:
    """The directory of the workspace with this id.

    Raises:
        RendezvousError: there is none.
    """
    for directory in list_workspaces():
        if directory.workspace_id == workspace_id:
            return directory
    raise RendezvousError(
        f"There is no workspace {workspace_id!r}.",
        evidence=f"Looked in {workspaces_dir()}.",
        remedy="`hpc-workspace ps` lists yours; is HPC_WORKSPACE_HOME the same as where it was started?",
    )


def list_workspaces() -> list[WorkspaceDirectory]:
    """The directories of all workspaces of this user, in order of their ids."""
    root = workspaces_dir()
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RendezvousError(
            f"{root} can't be read.",
            evidence=str(error),
            remedy="Set HPC_WORKSPACE_HOME to a directory that you own.",
        ) from error
    return [WorkspaceDirectory(root / name) for name in names if not name.startswith(".")]
