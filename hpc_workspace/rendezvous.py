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
import os
import shutil
import stat
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from hpc_workspace import clock, files, locks
from hpc_workspace.errors import RendezvousCorruptError, RendezvousError
from hpc_workspace.record import SCHEMA, Record, Spec

_TOKEN = "token"  # noqa: S105 - a file's name
_ENVIRONMENT = "environment"
_RUNTIME_ENVIRONMENT = "runtime_environment"
MAX_BYTES = 256 * 1024
_LOCK_TIMEOUT_S = 5.0
_LOOK_S = (0.01, 0.02)

_Value = TypeVar("_Value", bound=BaseModel)


def state_dir() -> Path:
    """`$HPC_WORKSPACE_HOME`, else `~/.hpc_workspace`: it must be visible from client and nodes."""
    return Path(os.environ.get("HPC_WORKSPACE_HOME") or "~/.hpc_workspace").expanduser().absolute()


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
            directory._write("spec.json", spec.model_dump_json(indent=1).encode())
            directory._write(_TOKEN, token.encode())
            for name, variables in ((_ENVIRONMENT, environment), (_RUNTIME_ENVIRONMENT, runtime_environment)):
                if variables:
                    pairs = (f"{key}={value}" for key, value in variables.items())
                    directory._write(name, "\0".join(pairs).encode("utf-8", "surrogateescape"))
            for log in (directory.node_log, directory.server_log):
                os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            directory.remove()
            raise _unwritable(root, error) from error
        return directory

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
        """
        # NFS caches "no such file" for up to a minute; listing the directory makes it look again.
        if "record.json" not in os.listdir(self.path):
            return None
        return self._read_model("record.json", Record)

    def record_age_s(self) -> float:
        """How long ago the record was written, by the file server's clock.

        Raises:
            RendezvousError: there is none, or the directory can't be written.
        """
        try:
            return files.age_s(self.path / "record.json")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def wait_final_record(self, timeout_s: float) -> Record | None:
        """The record once it says how the workspace ended; None if it does not within `timeout_s`.

        Raises: as `read_record`.
        """
        deadline = clock.Deadline(timeout_s)
        for pause_s in clock.pauses_s(*_LOOK_S):
            record = self.read_record()
            if record is not None and record.is_final:
                return record
            if deadline.is_over:
                break
            clock.sleep(pause_s)
        return None

    def publish(self, record: Record) -> None:
        """Put `record` in place, whole or not at all.

        Raises:
            RendezvousError: the disk is full or gone.
        """
        try:
            with locks.tidily(self.path / "record.lock", _LOCK_TIMEOUT_S):
                self._write("record.json", record.model_dump_json(indent=1).encode())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def forget_secrets(self) -> None:
        """Remove the key and the forwarded values: nothing can reach this workspace any more."""
        for name in (_TOKEN, _ENVIRONMENT, _RUNTIME_ENVIRONMENT):
            (self.path / name).unlink(missing_ok=True)

    def write_batch_script(self, text: str) -> None:
        self._write("job.sbatch", text.encode("utf-8", "surrogateescape"))

    def touch_heartbeat(self) -> None:
        """Set the heartbeat's time to now, by the file server's clock."""
        descriptor = os.open(self.heartbeat, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)

    def heartbeat_age_s(self) -> float | None:
        """How old the heartbeat is, by the file server's clock, or None if there never was one."""
        try:
            return files.age_s(self.heartbeat)
        except FileNotFoundError:
            return None

    def log_tail(self, path: Path, lines: int = 12) -> str:
        """The last lines of a log, without control characters; empty if there is none."""
        try:
            with path.open("rb") as log:
                log.seek(max(0, path.stat().st_size - 16 * 1024))
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
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if wrong := _distrust(found):
                raise RendezvousCorruptError(
                    f"{path} {wrong}: it is not trusted.", remedy="Somebody changed it; end the workspace."
                )
            return file.read(MAX_BYTES + 1)

    def _read_model(self, name: str, model: type[_Value]) -> _Value | None:
        data = self._read(name)
        if data is None:
            return None
        try:
            value = model.model_validate_json(data)
        except ValidationError as error:
            newer = _newer_schema(data)
            raise RendezvousCorruptError(
                f"{self.path / name} " + (f"has schema {newer}, newer than {SCHEMA}." if newer else "is not valid."),
                evidence="" if newer else str(error.errors(include_url=False, include_input=False)[0]["msg"]),
                remedy="Use the version of hpc-workspace that made it." if newer else "",
            ) from error
        if getattr(value, "workspace_id", self.workspace_id) != self.workspace_id:
            raise RendezvousCorruptError(f"{self.path / name} is of another workspace.")
        return value


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
    import json

    try:
        schema = json.loads(data).get("schema_version")
    except (ValueError, AttributeError):
        return None
    return schema if isinstance(schema, int) and schema > SCHEMA else None


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


def list_workspaces() -> list[WorkspaceDirectory]:
    """The directories of all workspaces of this user, in order of their ids."""
    root = workspaces_dir()
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return []
    return [WorkspaceDirectory(root / name) for name in names if not name.startswith(".")]
