"""Credentials for registries: found where Docker, Podman and Apptainer keep them. Never on argv, never in an error.

Sources: Docker's config.json (docker-login(1), with credsStore, credHelpers and docker-credential-helpers' protocol),
containers-auth.json(5), apptainer(1) 1.4.5 (`registry login`, APPTAINER_DOCKER_USERNAME).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_workspace import processes
from hpc_workspace.errors import PrerequisiteError
from hpc_workspace.images.reference import DOCKER_HUB

_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_HELPER_TIMEOUT_S = 30.0
# The name under which docker-login(1) keeps Docker Hub's.
_DOCKER_HUB_KEYS = ("index.docker.io", DOCKER_HUB, "registry-1.docker.io")
_TOKEN_USER = "<token>"  # noqa: S105 - what helpers give in place of a user beside an identity token
_LARGEST_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Credentials:
    """A login for one registry.

    Attributes:
        found_in: where it is from, in words; for messages.
        user: empty with an identity token.
        secret: the password, or the identity token.
    """

    found_in: str
    user: str
    secret: str = field(repr=False)

    @property
    def is_token(self) -> bool:
        return not self.user


@dataclass(frozen=True)
class Search:
    """What a search for credentials found (None: nothing), and where it looked, in words, for a message."""

    credentials: Credentials | None
    looked_in: tuple[str, ...]


def find_credentials(registry: str, repository: str, environment: Mapping[str, str] | None = None) -> Search:
    """The login for `registry`, as Apptainer would find it: the environment first, then the files of `registry login`,
    Podman and Docker.

    A file that can't be read, and a helper that is not there or fails, are named in `looked_in` with the reason.
    """
    environment = os.environ if environment is None else environment
    looked_in: list[str] = []
    for prefix in ("APPTAINER", "SINGULARITY"):
        user, secret = (environment.get(f"{prefix}_DOCKER_{name}") for name in ("USERNAME", "PASSWORD"))
        if user and secret:
            name = f"${prefix}_DOCKER_USERNAME"
            return Search(Credentials(name, user, secret), (name,))
    for name, read in _documents(environment):
        document = read()
        if document is None:
            continue
        if isinstance(document, str):
            looked_in.append(f"{name} ({document})")
            continue
        try:
            found = _of_document(document, name, registry, repository)
        except (PrerequisiteError, processes.ProgramTimeoutError, ValueError, OSError) as error:
            looked_in.append(f"{name} ({error})")
            continue
        looked_in.append(name)
        if found is not None:
            return Search(found, tuple(looked_in))
    return Search(None, tuple(looked_in))


def _documents(environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Name of each place for credentials, and what reads it: a JSON object, why there is none, or None: no place."""
    if text := environment.get("DOCKER_AUTH_CONFIG"):
        yield "$DOCKER_AUTH_CONFIG", lambda: _parse(text)
    home = Path(environment.get("HOME") or "~").expanduser()
    runtime_dir = environment.get("XDG_RUNTIME_DIR")
    paths = [
        environment.get("REGISTRY_AUTH_FILE"),
        Path(environment.get("APPTAINER_CONFIGDIR") or home / ".apptainer") / "docker-config.json",
        Path(runtime_dir) / "containers" / "auth.json" if runtime_dir else None,
        Path(environment.get("DOCKER_CONFIG") or home / ".docker") / "config.json",
    ]
    for path in paths:
        if path:
            yield str(path), lambda path=Path(path): _read(path)


def _read(path: Path) -> dict[str, Any] | str | None:
    try:
        with path.open("rb") as file:
            return _parse(file.read(_LARGEST_FILE_BYTES).decode("utf-8", "replace"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror or "can't be read"


def _parse(text: str) -> dict[str, Any] | str:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return "is not JSON"
    return document if isinstance(document, dict) else "is not a JSON object"


def _of_document(document: dict[str, Any], name: str, registry: str, repository: str) -> Credentials | None:
    """Raises: ValueError, PrerequisiteError, ProgramTimeoutError: what it has for the registry is of no use."""
    helpers, auths = _table(document, "credHelpers"), _table(document, "auths")
    for key in _keys(registry, repository):
        if helper := helpers.get(key):
            return _ask_helper(str(helper), key, name)
    for key in _keys(registry, repository):
        for written, entry in auths.items():
            if isinstance(entry, dict) and _normal(written) == key and (found := _of_entry(entry, name)) is not None:
                return found
    store = document.get("credsStore")
    return _ask_helper(str(store), _helper_key(registry), name) if store else None


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    table = document.get(key)
    return table if isinstance(table, dict) else {}


def _keys(registry: str, repository: str) -> list[str]:
    """What an entry for the image may be called, the most exact first; containers-auth.json(5) knows repositories."""
    hosts = _DOCKER_HUB_KEYS if registry == DOCKER_HUB else (registry,)
    parts = repository.split("/")
    exact = [f"{registry}/{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1)]
    return [*exact, *hosts]


def _normal(key: str) -> str:
    """An entry's name without what Docker puts around a host: `https://index.docker.io/v1/`."""
    bare = re.sub(r"^https?://", "", key).rstrip("/")
    return re.sub(r"/v[12]$", "", bare).lower()


def _helper_key(registry: str) -> str:
    return "https://index.docker.io/v1/" if registry == DOCKER_HUB else registry


def _of_entry(entry: dict[str, Any], name: str) -> Credentials | None:
    if token := entry.get("identitytoken"):
        return Credentials(name, "", str(token))
    if entry.get("username") and entry.get("password"):
        return Credentials(name, str(entry["username"]), str(entry["password"]))
    if not entry.get("auth"):
        return None  # with a credsStore, docker-login leaves an empty entry here
    try:
        user, colon, secret = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ValueError("its entry is not base64 of user:password") from error
    if not colon:
        raise ValueError("its entry is not base64 of user:password")
    return Credentials(name, user, secret)


def _ask_helper(helper: str, key: str, name: str) -> Credentials | None:
    """What `docker-credential-<helper> get` says; the host goes to its stdin, the answer is JSON on its stdout."""
    program = f"docker-credential-{helper}"
    if not _HELPER.fullmatch(helper):
        raise ValueError("the name of its credential helper is not a program's")
    ended = processes.run([program, "get"], timeout_s=_HELPER_TIMEOUT_S, input=f"{key}\n".encode())
    if ended.returncode != 0:
        if "not found" in ended.said:  # docker-credential-helpers: "credentials not found in native keychain"
            return None
        raise ValueError(f"{program} failed with exit code {ended.returncode}")
    answer = _parse(ended.stdout)
    if isinstance(answer, str) or not answer.get("Secret"):
        raise ValueError(f"{program} gave no credentials")
    user = str(answer.get("Username") or "")
    return Credentials(f"{name}, {program}", "" if user == _TOKEN_USER else user, str(answer["Secret"]))
