"""Images: from what the user names to a file that a node can run, fetched once and published whole."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from hpc_workspace import apptainer, locks, processes
from hpc_workspace.errors import ImageError

_PULL_TIMEOUT_S = 4 * 3600.0
_LOCK_TIMEOUT_S = 4 * 3600.0
_SCHEME = re.compile(r"[a-z][a-z0-9-]*:")


def cache_dir(option: str | None) -> Path:
    """The SIF store: `cache_dir`, else `$HPC_WORKSPACE_CACHE`, else `~/.apptainer_cache`."""
    return Path(option or os.environ.get("HPC_WORKSPACE_CACHE") or "~/.apptainer_cache").expanduser().absolute()


def as_reference(image: str) -> str | None:
    """`image` as a reference with its scheme, or None if it is a path. A bare name is Docker's."""
    if _SCHEME.match(image) and "://" in image:
        return image
    if image.endswith(".sif") or image.startswith(("/", "./", "../", "~")) or Path(image).exists():
        return None
    return f"docker://{image}"


def store_path(store: Path, reference: str, platform: str) -> Path:
    """Where `reference` is kept: a readable name and a digest, so that names that differ never share a file."""
    digest = hashlib.sha256(f"{platform}\0{reference}".encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", reference.partition("://")[2])[:80]
    return store / f"{readable}-{digest}.sif"


def resolve(image: str, *, runtime: str, store: Path, platform: str, pull_policy: str) -> str:
    """The path of the SIF file or sandbox directory for `image`, fetched if need be.

    Args:
        pull_policy: for references. `missing`: what the store has is taken. `newer`: the registry is asked, and what it
            has now is fetched unless the runtime's cache has it. `always`: fetched whatever the cache has. `never`:
            what the store has, or an error.

    Raises:
        ImageError: it is missing, is no image, or can't be fetched.
        PrerequisiteError: it must be fetched, and there is no Apptainer here.
    """
    reference = as_reference(image)
    if reference is None:
        path = str(Path(image).expanduser().absolute())
        apptainer.require_image(path)
        return path
    target = store_path(store, reference, platform)
    asks_registry = pull_policy in ("always", "newer")
    if target.exists() and not asks_registry:
        return str(target)
    if pull_policy == "never":
        raise ImageError(f"{reference} is not in the store {store}.", remedy="Set pull_policy='missing' to fetch it.")
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locks.tidily(target.with_suffix(".lock"), _LOCK_TIMEOUT_S):
        # Somebody else may have fetched it while we waited.
        if asks_registry or not target.exists():
            _pull(reference, target, apptainer.choose_runtime(runtime), platform, use_cache=pull_policy != "always")
    return str(target)


def _pull(reference: str, target: Path, runtime: apptainer.Runtime, platform: str, *, use_cache: bool) -> None:
    """Fetch and convert `reference` beside `target`, then put it in place, whole or not at all."""
    aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    argv = apptainer.build_pull_argv(
        runtime, str(aside), reference, arch=platform.partition("/")[2] or platform, use_cache=use_cache
    )
    prefix = runtime.upper()
    environment = dict(os.environ) | {f"{prefix}_CACHEDIR": str(target.parent), f"{prefix}_TMPDIR": str(target.parent)}
    try:
        ended = processes.run(argv, timeout_s=_PULL_TIMEOUT_S, env=environment)
        if ended.returncode != 0:
            raise ImageError(
                f"Failed to pull and convert Docker image {reference}.",
                evidence=ended.said,
                remedy="Check the name, the network from here and the registry's login (apptainer registry login).",
            )
        apptainer.require_image(str(aside))
        aside.replace(target)
    except processes.ProgramTimeoutError as error:
        raise ImageError(f"Failed to pull and convert Docker image {reference}.", evidence=str(error)) from error
    finally:
        aside.unlink(missing_ok=True)
