"""What the server is told at its start: keys, where commands begin, where large outputs go.

The keys come in a 0600 file named by the environment, never on argv or in the environment itself.
"""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

CONFIG_VARIABLE = "HPC_WORKSPACE_SERVER_CONFIG"


class SettingsError(ValueError):
    """The configuration is missing or unusable; the message is one line for a log."""


@dataclass(frozen=True)
class Settings:
    """Validated configuration. The keys are kept out of the repr.

    Attributes:
        toolbox: the root of the toolbox that this server runs from, inside a container; None where it runs in an
            interpreter of the machine's own.
    """

    session_api_keys: tuple[str, ...] = field(repr=False)
    working_dir: str
    spool_dir: Path
    toolbox: str | None = None


def load_settings(environ: dict[str, str], toolbox: str | None = None) -> Settings:
    """Read the file that `HPC_WORKSPACE_SERVER_CONFIG` names.

    Args:
        toolbox: as in `Settings`; no part of the file.

    Raises:
        SettingsError: No file is named, it can't be read, is open to others, or holds no key.
    """
    name = environ.get(CONFIG_VARIABLE)
    if not name:
        raise SettingsError(f"{CONFIG_VARIABLE} is not set: name the 0600 JSON file that holds session_api_keys")
    path = Path(name)
    try:
        mode = path.stat().st_mode & 0o777
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} can't be read as JSON: {error}") from error
    if mode & 0o077:
        raise SettingsError(f"{path} has mode {mode:04o}: others could read the key; chmod 600 it")
    return replace(_settings_of(values, path), toolbox=toolbox)


def _settings_of(values: object, path: Path) -> Settings:
    if not isinstance(values, dict):
        raise SettingsError(f"{path} does not hold a JSON object")
    keys = values.get("session_api_keys")
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key for key in keys):
        raise SettingsError(f"{path} has no session_api_keys: the server does not run without a key")
    spool = values.get("spool_dir")
    if not isinstance(spool, str) or not Path(spool).is_absolute():
        raise SettingsError(f"{path}: spool_dir must be an absolute path, not {spool!r}")
    working = values.get("working_dir", "/workspace")
    if not isinstance(working, str) or not Path(working).is_absolute():
        raise SettingsError(f"{path}: working_dir must be an absolute path, not {working!r}")
    return Settings(tuple(keys), working, Path(spool))


def command_environment(settings: Settings) -> dict[str, str]:
    """The image's own environment: what this process was started with, less what is the server's.

    `/proc/self/environ` is used rather than `os.environ`, because Python may have changed the latter (it sets
    LC_CTYPE in a C locale, PEP 538), and images without that locale then complain in every perl and ssh.
    """
    environment = _initial_environment()
    return {name: value for name, value in environment.items() if not _is_servers_own(name, value, settings)}


def _initial_environment() -> dict[str, str]:
    try:
        raw = Path("/proc/self/environ").read_bytes()
    except OSError:  # macOS, or a container without /proc
        return dict(os.environ)
    return parse_environment(raw)


def parse_environment(raw: bytes) -> dict[str, str]:
    """Names and values of entries that end with NUL, as in /proc/pid/environ (proc(5))."""
    pairs = (os.fsdecode(entry).partition("=") for entry in raw.split(b"\0") if b"=" in entry)
    return {name: value for name, _, value in pairs if name}


def _is_servers_own(name: str, value: str, settings: Settings) -> bool:
    if name.startswith("HPC_WORKSPACE_SERVER_"):
        return True
    if name == "PYTHONHOME" and _is_our_python(value):
        return True
    return any(key in value for key in settings.session_api_keys)


def _is_our_python(home: str) -> bool:
    """Whether PYTHONHOME names the toolbox; the image's own stays."""
    return (Path(home) / "toolbox.json").exists()
