"""A site's and a user's settings: environment > file > default.

The file is `$HPC_WORKSPACE_CONFIG`, else `$XDG_CONFIG_HOME/hpc-workspace/config.toml` (`~/.config` where that is not
set). `[images] fetch_on = "transfer"` in it says what `HPC_WORKSPACE_IMAGES_FETCH_ON=transfer` in the environment does.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hpc_workspace.errors import ConfigError
from hpc_workspace.options import Connect, Duration, PullPolicy, SlurmFields, SlurmOptions
from hpc_workspace.text import Text

_HOST = re.compile(r"[A-Za-z0-9.-]+(:\d{1,5})?|\[[0-9a-fA-F:]+\](:\d{1,5})?")
# mksquashfs(1) 4.6, -mem: a number with one of K, M, G.
_MEMORY = re.compile(r"[1-9]\d*[KMG]", re.IGNORECASE)


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError("is not a host such as registry.example.org:5000")
    return value.lower()


def _memory(value: str) -> str:
    if not _MEMORY.fullmatch(value):
        raise ValueError("is not a size such as 512M or 2G")
    return value.upper()


def _as_list(value: object) -> object:
    """A list in the environment is written with commas."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class ImageSettings(BaseModel):
    """How images are fetched.

    Attributes:
        fetch_on: the Slurm partition whose nodes have a network; None: images are fetched where they are asked for.
        plain_http: registries that are spoken to without TLS, each a host with its port.
        convert_cpus: how many CPUs a conversion may use; None: the job's own in a job, else at most 2.
        convert_memory: for mksquashfs's buffers; None: half of the job's memory in a job where Slurm says how much that
            is, else 1G. What the conversion needs beside it is some 100 MB.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fetch_on: Text | None = None
    plain_http: Annotated[list[Annotated[str, AfterValidator(_host)]], BeforeValidator(_as_list)] = Field(
        default_factory=list
    )
    convert_cpus: Annotated[int, Field(gt=0)] | None = None
    convert_memory: Annotated[str, AfterValidator(_memory)] | None = None


class WorkspaceSettings(BaseModel):
    """Options of every workspace that does not say otherwise; their meaning is that of `WorkspaceOptions`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_dir: Text | None = None
    connect: Connect | None = None
    runtime: Literal["auto", "apptainer", "singularity"] | None = None
    pull_policy: PullPolicy | None = None
    queue_timeout: Duration = None
    idle_timeout: Duration = None


class Settings(BaseModel):
    """All settings, each section a table of the file.

    Attributes:
        slurm: for every job that does not say otherwise.
        origins: where each value that is not built in is from, by `section.name`: the file's path or `$VARIABLE`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: WorkspaceSettings = Field(default_factory=WorkspaceSettings)
    slurm: SlurmFields = Field(default_factory=SlurmFields)
    images: ImageSettings = Field(default_factory=ImageSettings)
    origins: dict[str, str] = Field(default_factory=dict)

    def items(self) -> list[tuple[str, object, str]]:
        """Every setting: its key, its value and where that is from."""
        found = []
        for section in _SECTIONS:
            for name, value in getattr(self, section):
                key = f"{section}.{name}"
                found.append((key, value, self.origins.get(key, "default")))
        return found

    def fill_in(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a workspace: `given`, and for what is not given the settings."""
        chosen = {name: getattr(self.workspace, name) for name in self.workspace.model_fields_set}
        chosen |= given
        slurm = given.get("slurm")
        if isinstance(slurm, Mapping):
            slurm = SlurmOptions(**slurm)
        if isinstance(slurm, SlurmOptions):
            chosen["slurm"] = self.fill_in_slurm(slurm)
        return chosen

    def fill_in_slurm(self, given: SlurmOptions) -> SlurmOptions:
        """`given`, and for what it does not say the settings. A list or table of its own takes the place of theirs."""
        site = {name: getattr(self.slurm, name) for name in self.slurm.model_fields_set}
        own = {name: getattr(given, name) for name in given.model_fields_set}
        for name, rivals in _RIVALS.items():
            if name in own:
                site = {key: value for key, value in site.items() if key not in rivals}
        return SlurmOptions(**(site | own))


# Who asks for one of these does not want the site's word on the other.
_RIVALS = {
    "mem": ("mem_per_cpu", "mem_per_gpu"),
    "mem_per_cpu": ("mem", "mem_per_gpu"),
    "mem_per_gpu": ("mem", "mem_per_cpu"),
}


def config_file() -> Path:
    """Where the settings are looked for; the file need not be there."""
    if said := os.environ.get("HPC_WORKSPACE_CONFIG"):
        return Path(said).expanduser().absolute()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return (Path(base) / "hpc-workspace" / "config.toml").expanduser().absolute()


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings that hold now.

    Raises:
        ConfigError: the file can't be read or has a key that does not exist, or a value is wrong; it says where.
    """
    environment = os.environ if environment is None else environment
    path = config_file()
    values = _read(path)
    if "origins" in values:
        raise ConfigError(f"{path}: origins is no setting.", option="origins")
    _require_known(environment)
    origins = {f"{section}.{name}": str(path) for section, table in values.items() for name in _names(table)}
    for section, model in _SECTIONS.items():
        for name in model.model_fields:
            variable = _variable(section, name)
            if variable not in environment:
                continue
            table = values.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: {section} is not a table.", option=section)
            table.pop(name, None)  # an empty value takes away what the file says
            if environment[variable]:
                # The one line of shell that a variable can hold.
                table[name] = [environment[variable]] if name == "setup" else environment[variable]
            origins[f"{section}.{name}"] = f"${variable}"
    try:
        return Settings.model_validate(values | {"origins": origins})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        what = "is no setting" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{origins.get(key, path)}: {key}: {what}.", option=key, remedy="docs/cluster.md has every setting."
        ) from error


_SECTIONS: dict[str, type[BaseModel]] = {"workspace": WorkspaceSettings, "slurm": SlurmFields, "images": ImageSettings}
# Variables that have a name of their own.
_VARIABLES = {("workspace", "cache_dir"): "HPC_WORKSPACE_CACHE"}


def _require_known(environment: Mapping[str, str]) -> None:
    """Raises: ConfigError: a variable looks like a setting and is none: a misspelt one would do nothing, silently."""
    known = {_variable(section, name) for section, model in _SECTIONS.items() for name in model.model_fields}
    prefixes = tuple(f"HPC_WORKSPACE_{section}_".upper() for section in _SECTIONS)
    for variable in environment:
        if variable.startswith(prefixes) and variable not in known:
            raise ConfigError(f"${variable} is no setting.", option=variable, remedy="docs/cluster.md has them all.")


def _variable(section: str, name: str) -> str:
    return _VARIABLES.get((section, name)) or f"HPC_WORKSPACE_{section}_{name}".upper()


def _names(table: object) -> list[str]:
    return list(table) if isinstance(table, dict) else []


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        if os.environ.get("HPC_WORKSPACE_CONFIG"):
            raise ConfigError(
                f"{path}, which HPC_WORKSPACE_CONFIG names, is not there.", option="HPC_WORKSPACE_CONFIG"
            ) from error
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} can't be read.", evidence=str(error), remedy="It is a TOML file.") from error
