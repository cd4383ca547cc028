"""What a toolbox says of itself: the digest of each of its files, and whether it can be trusted."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

MANIFEST = "toolbox.json"
PREFIX = "toolbox-"
_UNREAD = "unread: "


def verify_toolbox(path: Path) -> list[str]:
    """What is wrong with the toolbox at `path`, a sentence each, every file read; empty if it is whole."""
    try:
        manifest = read_manifest(path)
        found = [f"{path} {reason}." for reason in reasons_not_to_trust(path.stat())]
    except OSError as error:
        return [f"{path} can't be looked at: {error}"]
    if manifest is None:
        return [*found, f"{path / MANIFEST} is missing, or can't be read."]
    if manifest.get("key") != path.name.removeprefix(PREFIX):
        found.append(f"{path / MANIFEST} is of another toolbox: {manifest.get('key')}.")
    listed = manifest.get("digests")
    if not isinstance(listed, dict):
        return [*found, f"{path / MANIFEST} lists no files: it was made by an older version."]
    return found + _differences(listed, digests_of(path))


def _differences(listed: dict[str, str], there: dict[str, str]) -> list[str]:
    sentences = {name: f"{name} is missing." for name in listed.keys() - there.keys()}
    sentences |= {name: f"{name} does not belong there." for name in there.keys() - listed.keys()}
    for name in listed.keys() & there.keys():
        if there[name].startswith(_UNREAD):
            sentences[name] = f"{name} can't be read: {there[name].removeprefix(_UNREAD)}."
        elif listed[name] != there[name]:
            sentences[name] = f"{name} was changed."
    return [sentences[name] for name in sorted(sentences)]


def reasons_not_to_trust(found: os.stat_result) -> list[str]:
    reasons = []
    if not stat.S_ISDIR(found.st_mode):
        reasons.append("is not a directory")
    if found.st_uid not in (os.geteuid(), 0):
        reasons.append(f"belongs to user id {found.st_uid}")
    if found.st_mode & 0o022:
        reasons.append(f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})")
    return reasons


def read_manifest(path: Path, dir_fd: int | None = None) -> dict[str, Any] | None:
    """The manifest; None if there is none that can be read.

    Raises:
        OSError: it can't be told, because the file system does not answer.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK
    try:
        descriptor = os.open(path / MANIFEST if dir_fd is None else MANIFEST, flags, dir_fd=dir_fd)
        with os.fdopen(descriptor, "rb") as file:
            manifest = json.load(file)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def digests_of(root: Path) -> dict[str, str]:
    """The digest of every file, by its path below `root`; the manifest is left out."""
    digests = {}
    for folder, subfolders, names in os.walk(root):
        for path in (Path(folder, name) for name in (*names, *subfolders)):
            if path.is_symlink() or not path.is_dir():
                digests[path.relative_to(root).as_posix()] = digest_of(path)
    digests.pop(MANIFEST, None)
    return digests


def digest_of(path: Path) -> str:
    """A file's SHA-256, or what it is instead: a link and its target, something else, one that can't be read."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if not path.is_file():
        return "no file"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{_UNREAD}{error}"
