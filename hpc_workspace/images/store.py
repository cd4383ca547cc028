"""The store: what has been fetched, on a disk that nodes share, and what makes it trusted.

    <store>/                              0700 where we make it
        images/<hex>-<os>-<arch>.sif      an image, whole: renamed into place; its name is the digest of its source
        images/<hex>-<os>-<arch>.json     `ImageFacts`: where it came from, the SIF file's own SHA-256
        refs/<key>.json                   `Ref`: which digest a name has, as of when the registry was last asked
        layers/<hex>                      blobs and manifests, each checked against its name; `.part` while it comes
        claims/                           who fetches what now (`claims`)
        work/<token>/                     one conversion; its `owner` says whose
        toolbox-…/                        see `toolbox`

Nothing is believed because it is there: an image has its name only by the rename that ends a conversion, and a layer by
one that follows its check. Whatever a killed process left has another name, and the next fetch removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpc_workspace import claims, clock, files
from hpc_workspace.errors import ConfigError, ImageError
from hpc_workspace.images.reference import DIGEST, Reference
from hpc_workspace.owner import Owner

_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")
_LARGEST_JSON_BYTES = 64 * 1024
_OWNER = "owner"
_Model = TypeVar("_Model", bound=BaseModel)
# The work of a process on another node, of which nobody here can say whether it lives.
_WORK_STALE_S = 24 * 3600.0
# An image's file is touched when it is used, but not more often than this.
_USED_S = 3600.0


class ImageFacts(BaseModel):
    """What is known of one image in the store. `sha256` is of the SIF file, `digest` of what it was made from."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    digest: str
    platform: str
    reference: str
    size_bytes: int
    sha256: str
    fetched_at: float


class Ref(BaseModel):
    """Which image a name meant when its source was last asked; the file's own time is that of the question."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    reference: str
    platform: str = Field(pattern=f"^{_PLATFORM.pattern}$")
    digest: str = Field(pattern=f"^{DIGEST.pattern}$")


class Store:
    """One store. Holds a path and nothing else: every call looks at the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "images"
        self.refs = root / "refs"
        self.layers = root / "layers"
        self.claims = root / "claims"
        self.work = root / "work"

    def __repr__(self) -> str:
        return f"<Store {str(self.root)!r}>"

    def prepare(self) -> None:
        """Make the directories.

        Raises:
            ImageError: they can't be made, or anybody may write there.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(self.root.stat().st_mode)
            for folder in (self.images, self.refs, self.layers, self.claims, self.work):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    folder.chmod(mode)  # whatever the umask: who may enter the store may read what is in it
        except OSError as error:
            raise unwritable(self.root, error) from error
        self.require_trusted()

    def require_trusted(self) -> None:
        """Raises: ImageError: anybody may write to the store, so that nothing in it can be trusted."""
        try:
            mode = self.root.stat().st_mode
        except OSError:
            return
        if mode & stat.S_IWOTH:
            raise ImageError(
                f"The store {self.root} can be written by everybody: what is in it can't be trusted.",
                remedy=f"chmod o-w {self.root}, or set cache_dir (HPC_WORKSPACE_CACHE) to a directory of yours.",
            )

    @property
    def file_mode(self) -> int:
        """The mode of new files: who may enter the store may read them."""
        return 0o666 & stat.S_IMODE(self.root.stat().st_mode) & ~stat.S_IWOTH

    def image_path(self, digest: str, platform: str) -> Path:
        """Where the image with this source is, or will be."""
        return self.images / f"{_name(digest, platform)}.sif"

    def claim_name(self, digest: str, platform: str) -> str:
        return _name(digest, platform)

    def find(self, reference: Reference, platform: str) -> Path | None:
        """The image that `reference` meant when it was last resolved; None if it never was, or its image is gone."""
        ref = self.read_ref(reference, platform)
        return self.find_digest(ref.digest, platform) if ref is not None else None

    def find_digest(self, digest: str, platform: str) -> Path | None:
        path = self.image_path(digest, platform)
        return path if path.name in _names(self.images) else None

    def ref_path(self, reference: Reference, platform: str) -> Path:
        return self.refs / f"{ref_key(reference, platform)}.json"

    def read_ref(self, reference: Reference, platform: str) -> Ref | None:
        """What a name was resolved to; None if it never was, or the file is no such thing."""
        ref = _read_json(self.ref_path(reference, platform), Ref)
        return ref if ref is not None and (ref.reference, ref.platform) == (str(reference), platform) else None

    def asked_at_s(self, reference: Reference, platform: str) -> float | None:
        """When a name was last resolved, by the file server's clock; None if it never was."""
        try:
            return self.ref_path(reference, platform).stat().st_mtime
        except OSError:
            return None

    def write_ref(self, reference: Reference, platform: str, digest: str) -> None:
        """Raises: ImageError: the store can't be written."""
        ref = Ref(reference=str(reference), platform=platform, digest=digest)
        self._write(self.ref_path(reference, platform), ref.model_dump_json().encode())

    def publish(self, aside: Path, reference: Reference, digest: str, platform: str) -> Path:
        """Put the SIF file `aside` in its place, whole or not at all, with what is known of it. Returns the place.

        Raises:
            ImageError: the store can't be written.
        """
        target = self.image_path(digest, platform)
        try:
            facts = ImageFacts(
                digest=digest,
                platform=platform,
                reference=str(reference),
                size_bytes=aside.stat().st_size,
                sha256=sha256_of(aside),
                fetched_at=clock.wall_s(),
            )
            files.flush(aside)
            aside.chmod(self.file_mode)
            self._write(target.with_suffix(".json"), facts.model_dump_json(indent=1).encode())
            aside.replace(target)
        except OSError as error:
            raise unwritable(self.root, error) from error
        return target

    def read_facts(self, image: Path) -> ImageFacts | None:
        """What is known of an image; None if nothing is."""
        return _read_json(image.with_suffix(".json"), ImageFacts)

    def list_images(self) -> list[Path]:
        """Every image, by name."""
        return [self.images / name for name in sorted(_names(self.images)) if name.endswith(".sif")]

    def list_refs(self) -> list[Ref]:
        """Every name that was resolved, in order of the names."""
        found = (_read_json(self.refs / name, Ref) for name in _names(self.refs) if name.endswith(".json"))
        return sorted((ref for ref in found if ref is not None), key=lambda ref: (ref.reference, ref.platform))

    def refs_with_images(self) -> list[tuple[Path, Path]]:
        """The file of every name that was resolved, and where its image is, or was."""
        found = ((self.refs / name, _read_json(self.refs / name, Ref)) for name in _names(self.refs))
        return [(path, self.image_path(ref.digest, ref.platform)) for path, ref in found if ref is not None]

    def layer_path(self, digest: str) -> Path:
        """Where the blob is, or will be.

        Raises:
            ValueError: `digest` is none: it must not become a path.
        """
        if not DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is not a digest")
        return self.layers / digest.removeprefix("sha256:")

    def has_layer(self, digest: str, size_bytes: int) -> bool:
        """Whether the blob is here, whole: its check came before its name."""
        try:
            return self.layer_path(digest).stat().st_size == size_bytes
        except OSError:
            return False

    def note_use(self, image: Path) -> None:
        """Touch an image, so that `prune` knows that it is used. Where that can't be, nothing happens."""
        with contextlib.suppress(OSError):
            if clock.wall_s() - image.stat().st_mtime > _USED_S:
                os.utime(image)

    @contextlib.contextmanager
    def working_directory(self) -> Iterator[Path]:
        """A new directory for one conversion, removed at the end whatever happens; a killed one's goes with the next.

        Raises:
            OSError: it can't be made.
        """
        self.remove_dead_work()
        folder = self.work / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        try:
            (folder / _OWNER).write_text(f"{Owner.of(os.getpid())}\n")
            yield folder
        finally:
            remove_tree(folder)

    def remove_dead_work(self) -> list[Path]:
        """Remove the directories of conversions whose process is dead, or silent for a day. Returns them."""
        dead = [folder for name in _names(self.work) if self.is_dead_work(folder := self.work / name)]
        for folder in dead:
            remove_tree(folder)
        return dead

    def is_dead_work(self, folder: Path) -> bool:
        """Whether a conversion's directory is of a process that is dead, or silent for a day."""
        try:
            try:
                return claims.is_gone(folder / _OWNER, _WORK_STALE_S)
            except FileNotFoundError:  # just made, or just being removed
                return files.age_s(folder) > _WORK_STALE_S
        except OSError:
            return False

    def _write(self, path: Path, data: bytes) -> None:
        try:
            files.write_whole(path, data, self.file_mode)
        except OSError as error:
            raise unwritable(self.root, error) from error


def ref_key(reference: Reference, platform: str) -> str:
    """A name for what is kept of `reference`: names that differ never share one."""
    return hashlib.sha256(f"{platform}\0{reference}".encode()).hexdigest()[:40]


def require_platform(platform: str) -> None:
    """Raises: ConfigError: `platform` is none as OCI writes it."""
    if not _PLATFORM.fullmatch(platform):
        raise ConfigError(f"{platform!r} is not a platform.", option="platform", remedy="Write it as linux/amd64.")


def _name(digest: str, platform: str) -> str:
    """Raises: ValueError: one of them is not what it should be: it must not become a path."""
    if not DIGEST.fullmatch(digest) or not _PLATFORM.fullmatch(platform):
        raise ValueError(f"{digest!r} for {platform!r} names no image")
    return f"{digest.removeprefix('sha256:')}-{platform.replace('/', '-')}"


def unwritable(root: Path, error: OSError) -> ImageError:
    """The error of a store that can't be written, or has no room."""
    return ImageError(
        f"The store {root} can't be written.",
        evidence=str(error),
        remedy="hpc-workspace images prune makes room; cache_dir (HPC_WORKSPACE_CACHE) names another place.",
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(folder: Path) -> None:
    """Remove a directory and all in it, where images have taken its owner's rights away too. Nothing if it is gone.

    Raises:
        OSError: something of it can't be removed.
    """
    for _ in range(2):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except PermissionError:
            folder.chmod(0o700)
            for path, names, _ in os.walk(folder):  # from the top: a directory is opened after its mode was mended
                for name in names:
                    if not (below := Path(path, name)).is_symlink():
                        below.chmod(0o700)
        else:
            return
    shutil.rmtree(folder)


def _names(folder: Path) -> list[str]:
    """The names in a directory, those of files that are being made left out; none where it is not there."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []


def _read_json(path: Path, model: type[_Model]) -> _Model | None:
    try:
        with path.open("rb") as file:
            return model.model_validate_json(file.read(_LARGEST_JSON_BYTES))
    except (OSError, ValidationError):
        return None
