"""What ssh's own configuration says of a host, as ssh itself reads it: Include, Match, Host and all."""

from __future__ import annotations

import getpass
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from hpc_workspace import processes
from hpc_workspace.errors import PrerequisiteError

_TIMEOUT_S = 20.0
_DEFAULT_KNOWN_HOSTS = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")


@dataclass(frozen=True)
class SshSettings:
    """How a host is reached.

    Attributes:
        host: its name as it was given.
        hostname: the name or address to connect to.
        identities: private keys to try, those that are there; empty: the usual ones.
        identities_only: whether an agent's other keys are left alone.
        known_hosts: files with host keys.
        host_key_alias: the name that its key is kept under, if not its own.
        jump: hosts to go through, nearest first, each as `[user@]host[:port]`.
        proxy_command: a program that makes the connection; empty: there is none.
    """

    host: str
    hostname: str
    user: str
    port: int = 22
    identities: tuple[str, ...] = ()
    identities_only: bool = False
    known_hosts: tuple[str, ...] = _DEFAULT_KNOWN_HOSTS
    host_key_alias: str = ""
    jump: tuple[str, ...] = ()
    proxy_command: str = ""

    def __str__(self) -> str:
        return f"{self.user}@{self.hostname} (port {self.port})"


def read_settings(target: str, *, jump: tuple[str, ...] | None = None) -> SshSettings:
    """What holds for `target`, `[user@]host[:port]`. Without an ssh here, what holds without a configuration.

    Args:
        jump: goes before what the configuration says of it.
    """
    user, host, port = parse_target(target)
    argv = ["ssh", "-G", *(["-l", user] if user else []), *(["-p", str(port)] if port else []), "--", host]
    try:
        ended = processes.run(argv, timeout_s=_TIMEOUT_S)
    except (PrerequisiteError, processes.ProgramTimeoutError):
        ended = None
    if ended is None or ended.returncode != 0:
        return SshSettings(host, host, user or getpass.getuser(), port or 22, jump=jump or ())
    settings = parse_settings(host, ended.stdout)
    return settings if jump is None else replace(settings, jump=jump)


def parse_target(text: str) -> tuple[str, str, int | None]:
    """User (may be empty), host and port (may be None) of `[user@]host[:port]` or `ssh://[user@]host[:port]`."""
    user, _, place = text.removeprefix("ssh://").rstrip("/").rpartition("@")
    host, colon, port = place.rpartition(":")
    if colon and port.isdigit() and (":" not in host or host.startswith("[")):
        return user, host.strip("[]"), int(port)
    return user, place.strip("[]"), None


def parse_settings(host: str, output: str) -> SshSettings:
    """The settings in what `ssh -G` prints: a keyword in small letters and its value in each line (ssh(1), -G)."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in output.splitlines():
        keyword, _, value = line.partition(" ")
        found[keyword].append(value.strip())

    def one(keyword: str, default: str = "") -> str:
        value = found[keyword][0] if found[keyword] else default
        return "" if value == "none" else value

    files = [name for keyword in ("userknownhostsfile", "globalknownhostsfile") for name in one(keyword).split()]
    jump = one("proxyjump")
    return SshSettings(
        host=host,
        hostname=one("hostname", host),
        user=one("user") or getpass.getuser(),
        port=int(one("port", "22")),
        identities=tuple(path for path in map(_expanded, found["identityfile"]) if Path(path).is_file()),
        identities_only=one("identitiesonly") == "yes",
        known_hosts=tuple(files) or _DEFAULT_KNOWN_HOSTS,
        host_key_alias=one("hostkeyalias"),
        jump=tuple(part.strip() for part in jump.split(",")) if jump else (),
        proxy_command=one("proxycommand"),
    )


def _expanded(path: str) -> str:
    return str(Path(path).expanduser())
