"""The options of a workspace, validated before anything happens.

Shapes only: whether a file exists or a program is there is for the parts that use it.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from hpc_workspace.errors import ConfigError
from hpc_workspace.text import Text

# sbatch(1) 24.11, --time: "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes"
# and "days-hours:minutes:seconds".
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}", re.ASCII)
# sbatch(1) 24.11, --mem: a number with one of K, M, G, T; megabytes without.
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE | re.ASCII)
_GRES = re.compile(r"[\w./-]+(:[\w.-]+){0,2}(,[\w./-]+(:[\w.-]+){0,2})*")
_LONG_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# Those that a workspace's job must have as they are, and those that make another kind of job.
_OUR_SBATCH_OPTIONS = frozenset(
    (
        *(
            "array",
            "batch",
            "chdir",
            "clusters",
            "error",
            "export",
            "export-file",
            "help",
            "ignore-pbs",
            "input",
            "job-name",
        ),
        *(
            "no-requeue",
            "nodes",
            "ntasks",
            "open-mode",
            "output",
            "parsable",
            "quiet",
            "signal",
            "test-only",
        ),
        *("usage", "verbose", "version", "wait", "wrap"),
    )
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h|d)?", re.ASCII)
_DURATION_S = {"": 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
# The agent server's own threads count (OpenHands' has about 30); with less it would not even start.
_FEWEST_PROCESSES = 64
# What only a container can do.
_OF_CONTAINERS = ("extra_bind_mounts", "enable_gpu", "max_processes", "verify", "encryption_pem", "extra_ports")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _matching(pattern: re.Pattern[str], shape: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"is not {shape}")
        return value

    return AfterValidator(check)


def parse_size_bytes(value: str | int) -> int:
    """Bytes of `512M`, `4G`, `1T` (powers of 1024, as sbatch's --mem) or a bare number of bytes.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", value.strip(), re.IGNORECASE)
        if match is None:
            raise ValueError("is not a size such as 512M or 4G")
        size = int(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")
    if size <= 0:
        raise ValueError("is not above zero")
    return size


def parse_duration_s(value: str | float | None) -> float | None:
    """Seconds of `15min`, `90s`, `2h`, `1d` or a bare number of seconds; None stays None (never).

    Raises:
        ValueError: the text is none of these.
    """
    if value is None or isinstance(value, (int, float)):
        return None if value is None else float(value)
    match = _DURATION.fullmatch(value.strip())
    if not match:
        raise ValueError("is not a duration such as 90s, 15min, 2h or 1d")
    return float(match[1]) * _DURATION_S[match[2] or ""]


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_flag(value: object) -> object:
    """`true` and `false` of an environment variable as what they mean."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


PullPolicy = Literal["missing", "always", "newer", "never"]
Connect = Literal["auto", "loopback", "paramiko", "openssh", "srun", "ssh-command"]
VariableName = Annotated[str, _matching(_VARIABLE, "a variable's name")]
Duration = Annotated[float | None, BeforeValidator(parse_duration_s)]
SlurmTime = Annotated[
    str, BeforeValidator(_as_text), _matching(_TIME, "a time as sbatch takes it, such as 30, 01:00:00 or 2-12:00:00")
]
# sbatch(1) 24.11, --gres: "name[[:type]:count]", comma-separated; a count may have a K, M, G … of its own.
SlurmGres = Annotated[str, _matching(_GRES, "a list as sbatch takes it, such as gpu:1 or gpu:a100:2")]
SlurmMemory = Annotated[str, BeforeValidator(_as_text), _matching(_MEMORY, "a size as sbatch takes it, such as 4G")]


class SlurmFields(BaseModel):
    """What can be asked of Slurm: sbatch's long option names with underscores, its own formats.

    A field left out is left out of sbatch's argv too, so that the site's default holds.

    Attributes:
        time: sbatch's formats; a bare number is minutes.
        mem, mem_per_cpu, mem_per_gpu, tmp: a number with K, M, G or T; a bare number is megabytes.
        gres: `name[[:type]:count]`, several with commas.
        requeue: whether Slurm may start the job anew, elsewhere and with new files, after its node failed or another
            job preempted it; see `errors.SandboxRestarted`. False: it ends then.
        exclusive: True for the whole node; `user` and the like as sbatch takes them.
        extra: any other long option, by its name with dashes or underscores; None for a flag without a value. Not those
            that we set ourselves, such as `job-name` and `export`.
        setup: shell lines that run before the node program, such as `module load apptainer`.
        template: path of an own batch script template (jinja2) in place of `slurm_templates/workspace.sbatch.j2`.
        python: the interpreter on the node; it must have this package. None: the one that runs now.

    Source: sbatch(1) of Slurm 24.11.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None
    reservation: Text | None = None
    time: SlurmTime | None = None
    cpus_per_task: Annotated[int, Field(gt=0)] | None = None
    mem: SlurmMemory | None = None
    mem_per_cpu: SlurmMemory | None = None
    mem_per_gpu: SlurmMemory | None = None
    tmp: SlurmMemory | None = None
    gres: SlurmGres | None = None
    gpus: Text | None = None
    gpus_per_node: Text | None = None
    cpus_per_gpu: Annotated[int, Field(gt=0)] | None = None
    licenses: Text | None = None
    constraint: Text | None = None
    nodelist: Text | None = None
    exclude: Text | None = None
    exclusive: Annotated[bool | Text | None, BeforeValidator(_as_flag)] = None
    requeue: Annotated[bool, BeforeValidator(_as_flag)] = False
    begin: Text | None = None
    dependency: Text | None = None
    nice: int | None = None
    mail_type: Text | None = None
    mail_user: Text | None = None
    comment: Text | None = None
    extra: dict[Text, Text | None] = Field(default_factory=dict)
    setup: list[Text] = Field(default_factory=list)
    template: Text | None = None
    python: Text | None = None

    @model_validator(mode="after")
    def _extra_is_others(self) -> SlurmFields:
        for name in self.extra:
            option = name.lstrip("-").replace("_", "-")
            if not _LONG_OPTION.fullmatch(option):
                raise ValueError(f"extra: {name!r} is not the name of a long option of sbatch")
            # getopt takes the beginning of an option's name for the option (getopt_long(3)).
            if ours := [name for name in _OUR_SBATCH_OPTIONS if name.startswith(option)]:
                raise ValueError(f"extra: {option} is set by hpc-workspace itself ({min(ours)})")
            if option.replace("-", "_") in type(self).model_fields:
                raise ValueError(f"extra: {option} has a place of its own: give {option.replace('-', '_')}=")
        return self

    @field_validator("setup")
    @classmethod
    def _setup_has_no_options(cls, lines: list[str]) -> list[str]:
        # sbatch reads such lines until the first command, wherever in the script they come from.
        if any(line.lstrip().startswith("#SBATCH") for line in lines):
            raise ValueError("has a line of #SBATCH: give the option by its own name, or in extra={…}")
        return lines

    @model_validator(mode="after")
    def _one_memory(self) -> SlurmFields:
        given = [name for name in ("mem", "mem_per_cpu", "mem_per_gpu") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one of them")
        return self


class SlurmOptions(SlurmFields):
    """What to ask Slurm for; the attributes are those of `SlurmFields`.

    Raises:
        ConfigError: one is unknown, malformed or contradicts another; it names the option.
    """

    def __init__(self, **values: Any) -> None:
        with _config_errors("SlurmOptions"):
            super().__init__(**values)


def this_platform() -> str:
    """This machine's platform as OCI writes it, such as linux/amd64."""
    machine = platform.machine().lower()
    return "linux/" + {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


class WorkspaceOptions(BaseModel):
    """Every option of `ApptainerWorkspace`; `docs/options.md` says what each does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    server_image: Text | None = None
    sif_file: Text | None = None
    image: Text | None = None
    host_port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    mount_dir: Text | None = None
    working_dir: Text = "/workspace"
    cache_dir: Text | None = None
    forward_env: list[VariableName] = Field(default_factory=lambda: ["DEBUG"])
    detach_logs: bool = True
    extra_ports: bool = False
    platform: Text = Field(default_factory=this_platform)
    use_fakeroot: bool = True
    extra_bind_mounts: list[Text] = Field(default_factory=list)
    enable_gpu: bool = False
    enable_docker_compat: bool = True
    disable_mount_locations: list[Text] = Field(default_factory=lambda: ["hostfs", "bind-paths"])
    health_check_timeout: Annotated[float, Field(gt=0)] = 120.0
    pull_policy: PullPolicy = "missing"
    runtime: Literal["auto", "apptainer", "singularity", "process"] = "auto"
    writable: Literal["overlay", "tmpfs", "none"] = "overlay"
    max_processes: Annotated[int, Field(ge=_FEWEST_PROCESSES)] | None = None
    verify: bool | Text = False
    encryption_pem: Text | None = None
    slurm: SlurmOptions | Literal["auto"] | None = None
    connect: Connect = "auto"
    queue_timeout: Duration = None
    idle_timeout: Duration = 900.0

    def __init__(self, **values: Any) -> None:
        with _config_errors("ApptainerWorkspace"):
            super().__init__(**values)

    @model_validator(mode="after")
    def _one_image(self) -> WorkspaceOptions:
        given = [name for name in ("server_image", "sif_file", "image") if getattr(self, name) is not None]
        if self.runtime == "process" and given:
            raise ValueError(f"runtime='process' runs no image: leave out {given[0]}")
        for name in _OF_CONTAINERS if self.runtime == "process" else ():
            if getattr(self, name):
                raise ValueError(f"runtime='process' has no container: leave out {name}")
        if self.runtime != "process" and len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of server_image, sif_file and image (given: {said})")
        return self

    @model_validator(mode="after")
    def _absolute_working_dir(self) -> WorkspaceOptions:
        if not self.working_dir.startswith("/"):
            raise ValueError("working_dir must be absolute: it is a path inside the workspace")
        return self


class _config_errors:
    """Turn pydantic's ValidationError into one `ConfigError` that names the option and the remedy."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValidationError):
            raise config_error(self.owner, error) from error


_Model = TypeVar("_Model", bound=BaseModel)


def config_error(owner: str, error: ValidationError) -> ConfigError:
    """The first mistake in `error`, said as one that names the option. Values are left out: one may be a secret."""
    first = error.errors(include_url=False, include_input=False)[0]
    option = ".".join(_shown(part) for part in first["loc"] if not _is_union_arm(part))
    if first["type"] == "extra_forbidden":
        return ConfigError(
            f"{owner} has no option {option!r}.",
            option=option,
            remedy=f"Its options: {', '.join(sorted(_fields_of(owner)))}.",
        )
    reason = first["msg"].removeprefix("Value error, ")
    what = f"{owner}: {option} {reason}." if option else f"{owner}: {reason}."
    return ConfigError(what, option=option, remedy=_REMEDIES.get(option, ""))


_REMEDIES = {
    "time": 'Write it as sbatch does: SlurmOptions(time="01:00:00").',
    "mem": 'Write it as sbatch does: SlurmOptions(mem="4G").',
    "forward_env": 'Give names only, such as forward_env=["HF_HOME"]; the values are read from this process.',
}


def _shown(part: int | str) -> str:
    text = str(part)
    return text if text.isprintable() else ascii(text)


def _is_union_arm(part: object) -> bool:
    """Whether a step of pydantic's error location names a type of a union, or a dict's key, and not an option."""
    return isinstance(part, str) and (part.startswith(("literal[", "function-", "constrained-")) or part in _ARMS)


_ARMS = {"SlurmOptions", "str", "int", "float", "bool", "[key]"}


def _fields_of(owner: str) -> Mapping[str, object]:
    return SlurmOptions.model_fields if owner == "SlurmOptions" else WorkspaceOptions.model_fields
