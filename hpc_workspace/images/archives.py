"""Images in files of this machine: which image is in them, so that the store can know it by its content.

Sources: docker-save(1) (manifest.json of the archive), OCI image specification 1.1, image-layout.md.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

from hpc_workspace.errors import ImageError
from hpc_workspace.images.reference import DIGEST, Reference

_LARGEST_JSON_BYTES = 4 * 1024 * 1024


def digest_of_archive(reference: Reference) -> str:
    """The digest of the one image in the archive or layout that `reference` names.

    Raises:
        ImageError: it is not there, is no such thing, or holds several images.
    """
    path = Path(reference.repository)
    try:
        if reference.scheme == "oci":
            return _of_index(json.loads((path / "index.json").read_bytes()), reference)
        with tarfile.open(path) as archive:
            if reference.scheme == "oci-archive":
                return _of_index(json.loads(_member(archive, "index.json")), reference)
            return _of_docker_archive(archive, reference)
    except FileNotFoundError as error:
        raise ImageError(f"{reference} is not there.", evidence=str(error)) from error
    except (OSError, tarfile.TarError, KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
        raise ImageError(
            f"{reference} holds no image that can be read.",
            evidence=f"{type(error).__name__}: {error}",
            remedy="docker save and skopeo copy make such files.",
        ) from error


def _of_docker_archive(archive: tarfile.TarFile, reference: Reference) -> str:
    """The image's id, as Docker has it: the SHA-256 of its configuration."""
    listed: Any = json.loads(_member(archive, "manifest.json"))
    _require_one(listed, reference)
    return f"sha256:{hashlib.sha256(_member(archive, str(listed[0]['Config']))).hexdigest()}"


def _of_index(index: Any, reference: Reference) -> str:
    _require_one(index["manifests"], reference)
    digest = str(index["manifests"][0]["digest"])
    if not DIGEST.fullmatch(digest):
        raise ValueError("its manifest has no SHA-256")
    return digest


def _require_one(listed: Any, reference: Reference) -> None:
    if len(listed) != 1:
        raise ImageError(
            f"{reference} holds {len(listed)} images.", remedy="Save the one that is meant into a file of its own."
        )


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    return file.read(_LARGEST_JSON_BYTES)
