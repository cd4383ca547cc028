"""The settings that fit what was found, as a configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from hpc_workspace import files
from hpc_workspace.config import config_file
from hpc_workspace.doctor.finding import Finding, Setting
from hpc_workspace.errors import ConfigError

_SECTIONS = ("workspace", "slurm", "images")


def gather(findings: Iterable[Finding]) -> dict[str, tuple[Setting, str]]:
    """Each recommended setting by its key, with the reason; of two for one key the later finding's counts.

    Findings of a node come last: what was seen to work there counts more than what looks right from here.
    """
    found: dict[str, tuple[Setting, str]] = {}
    for finding in findings:
        for key, value in finding.recommends.items():
            where = f" on {finding.node}" if finding.node else ""
            found[key] = (value, f"{finding.name}{where}: {finding.found}")
    return found


def format_config(findings: Iterable[Finding]) -> str:
    """The recommended settings as TOML that `load_settings` reads; empty if there are none."""
    found = gather(findings)
    lines: list[str] = []
    for section in _SECTIONS:
        keys = [key for key in found if key.partition(".")[0] == section]
        if keys:
            lines += ["", f"[{section}]"]
        for key in keys:
            value, reason = found[key]
            lines += [f"# {_comment(reason)}", f"{key.partition('.')[2]} = {_toml(value)}"]
    return "\n".join(lines[1:]) + "\n" if lines else ""


def _toml(value: Setting) -> str:
    """A TOML value: JSON's strings, arrays and booleans are TOML's, but for a character that TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:160]


def save(text: str) -> Path:
    """Write the configuration file. Returns where it is.

    Raises:
        ConfigError: there is one already, or it can't be written.
    """
    path = config_file()
    if path.exists():
        raise ConfigError(
            f"{path} is there already, and is left as it is.", option="--save", remedy="Put the lines into it by hand."
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_whole(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path} can't be written.", option="--save", evidence=str(error)) from error
    return path
