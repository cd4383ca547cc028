"""The values that the client side and the node side exchange through the workspace directory.

`Spec` is what was asked for, written once by the client. `Record` is what became of it, written by the node program.
Neither ever holds a secret.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from hpc_workspace.text import Text

SCHEMA = 1
SCHEMA_MAX = 1_000_000

WorkspaceId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{3,40}$")]
State = Literal["starting", "ready", "ended", "failed"]
FINAL_STATES: frozenset[State] = frozenset({"ended", "failed"})


class Spec(BaseModel):
    """What the node program is asked to run.

    Attributes:
        launch_id: random, of this launch; the record repeats it, so that a record of an earlier one is never used.
        server: `bundled` (brought along, listens on a Unix socket) or `image` (OpenHands' own, in the image).
        image: path of a SIF or sandbox directory as the node sees it; None with runtime `process`.
        toolbox: the directory with the bundled server and its interpreter; None where it is not needed.
        max_processes: bound on the container's processes and threads; None: no bound of ours.
        verify: whether the image's signature is checked: by the user's keyring, or by the PEM file of this name.
        encryption_pem: the PEM file that opens an encrypted image.
        extra_ports: whether the image's VSCode and VNC are wanted too.
        binds: mounts in Apptainer's own `src[:dest[:opts]]` syntax, as the user gave them.
        ends_with_lease: whether the workspace ends as soon as the last client is gone.
        idle_timeout_s: ends after so long without a client and without a running command; None: never.
        may_restart: whether Slurm may requeue the job, so that what it needs to live again is kept when it is ended.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Annotated[int, Field(gt=0, lt=SCHEMA_MAX)] = SCHEMA
    workspace_id: WorkspaceId
    launch_id: Text
    runtime: Literal["auto", "apptainer", "singularity", "process"]
    server: Literal["bundled", "image"]
    image: Text | None
    toolbox: Text | None
    working_dir: Text
    mount_dir: Text | None
    binds: list[Text]
    use_fakeroot: bool
    enable_gpu: bool
    enable_docker_compat: bool
    disable_mount_locations: list[Text]
    writable: Literal["overlay", "tmpfs", "none"]
    max_processes: int | None = None
    verify: bool | Text = False
    encryption_pem: Text | None = None
    extra_ports: bool = False
    health_check_timeout_s: float
    ends_with_lease: bool
    idle_timeout_s: float | None
    may_restart: bool = False


class Failure(BaseModel):
    """Why a workspace failed, as an error of `errors.py` that the client raises in its own process.

    `leftovers` is what of it could not be cleared away: a line each. What a later version has added is passed over.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Text
    what: str
    evidence: str = ""
    remedy: str = ""
    leftovers: list[str] = Field(default_factory=list)


class Record(BaseModel):
    """Where a workspace is, and how it is.

    Attributes:
        job_id: Slurm's; None on this machine.
        restart_count: Slurm's SLURM_RESTART_COUNT; 0 in a job's first life and without Slurm.
        may_restart: whether the job may have another life after this one.
        node: the node's short name, as Slurm and SSH know it.
        port: of the node's 127.0.0.1, where the door listens.
        socket: the door's Unix socket on the node.
        python: the node program's interpreter; empty: not known.
        package: the directory in which that finds this package.
        owner: the mark of the node program's warden (`owner.Owner`): when that process has ended, all has.
        working_dir: where commands start, as they see it.
        mount_dir: the directory that is at /workspace and outlives the container; None: there is none.
        node_scratch: the workspace's 0700 directory on the node's own disk.
        extra_ports: ports inside the workspace by name (vscode, vnc); empty unless they were asked for.
        notices: what is not as it was asked for, with the reason, in words for a person.
        time_left_s: seconds until the job's time limit at the moment this was written; None: no limit is known.
        exit_reason: why it ended, in words; None while it runs.

    What a later version has added to it is passed over.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    schema_version: Annotated[int, Field(gt=0, lt=SCHEMA_MAX)] = SCHEMA
    workspace_id: WorkspaceId
    launch_id: Text
    job_id: Annotated[str, Field(pattern=r"^[0-9]{1,18}$")] | None
    restart_count: Annotated[int, Field(ge=0)]
    may_restart: bool = False
    state: State
    node: Text
    port: Annotated[int, Field(ge=0, lt=65536)]
    socket: Text
    python: Text = ""
    package: Text = ""
    owner: Text
    runtime: Text
    server: Literal["bundled", "image"]
    working_dir: Text
    mount_dir: Text | None = None
    node_scratch: Text
    started_at: float
    phases_s: dict[str, float] = Field(default_factory=dict)
    extra_ports: dict[str, Annotated[int, Field(gt=0, lt=65536)]] = Field(default_factory=dict)
    notices: list[str] = Field(default_factory=list)
    time_left_s: float | None = None
    exit_reason: str | None = None
    failure: Failure | None = None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def fence(self) -> tuple[int, int]:
        """Orders the lives that may write to one directory: a later one's is greater."""
        return int(self.job_id or 0), self.restart_count
