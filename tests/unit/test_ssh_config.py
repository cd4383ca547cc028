"""ssh's own configuration, as ssh reads it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpc_workspace.connect.ssh_config import parse_settings, parse_target


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("n01", ("", "n01", None)),
        ("me@n01", ("me", "n01", None)),
        ("me@gate.example.org:2222", ("me", "gate.example.org", 2222)),
        ("ssh://me@gate:22/", ("me", "gate", 22)),
        ("[fe80::1]:22", ("", "fe80::1", 22)),
        ("fe80::1", ("", "fe80::1", None)),
        ("me@domain@n01", ("me@domain", "n01", None)),
    ],
)
def test_a_host_may_have_a_user_and_a_port(text: str, parts: tuple[str, str, int | None]) -> None:
    assert parse_target(text) == parts


def told_by_ssh(folder: Path, config: str, host: str) -> str:
    """What the real ssh makes of a configuration."""
    (folder / "config").write_text(config)
    argv = ["ssh", "-F", str(folder / "config"), "-G", "--", host]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_what_ssh_understands_is_what_holds(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch()
    (tmp_path / "included").write_text("Host n*\n  ProxyJump me@gate:2222,inner\n  HostKeyAlias cluster\n")
    config = (
        f"Include {tmp_path}/included\n"
        f"Match host n01\n  User alice\n  Port 2022\n  HostName 10.1.2.3\n  IdentityFile {key}\n"
        f"  IdentityFile {tmp_path}/nosuch\n  IdentitiesOnly yes\n"
        f"Host *\n  User bob\n  UserKnownHostsFile {tmp_path}/a {tmp_path}/b\n"
    )
    found = parse_settings("n01", told_by_ssh(tmp_path, config, "n01"))
    assert (found.host, found.hostname, found.user, found.port) == ("n01", "10.1.2.3", "alice", 2022)
    assert found.identities == (str(key),)
    assert found.identities_only
    assert found.jump == ("me@gate:2222", "inner")
    assert found.host_key_alias == "cluster"
    assert found.known_hosts[:2] == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert found.proxy_command == ""
    other = parse_settings("x", told_by_ssh(tmp_path, config, "x"))
    assert (other.hostname, other.user, other.port, other.jump) == ("x", "bob", 22, ())


def test_a_proxy_command_is_seen_and_none_is_none(tmp_path: Path) -> None:
    found = parse_settings("x", told_by_ssh(tmp_path, "Host x\n  ProxyCommand nc %h %p\n", "x"))
    assert found.proxy_command == "nc %h %p"
    none = parse_settings("x", told_by_ssh(tmp_path, "Host x\n  ProxyCommand none\n  ProxyJump none\n", "x"))
    assert (none.proxy_command, none.jump) == ("", ())
