"""What is in the store: listed, checked, and thrown away when it is of no use any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hpc_workspace import claims, files, toolbox
from hpc_workspace.errors import ImageError
from hpc_workspace.images.store import Store, remove_tree, sha256_of, unwritable

# What somebody may be about to use is left alone for a day, whoever says that it is of no use.
_YOUNG_S = 24 * 3600.0


@dataclass(frozen=True)
class Listed:
    """One image of the store.

    Attributes:
        names: the references that mean it now; empty: nobody's, since they were fetched anew.
        digest, platform, fetched_at: empty and 0 where its facts are lost.
        unused_s: how long nobody has taken it, to a day.
    """

    path: Path
    names: tuple[str, ...]
    digest: str
    platform: str
    size_bytes: int
    fetched_at: float
    unused_s: float


def list_images(store: Store) -> list[Listed]:
    """Every image, in order of the first of its names.

    Raises:
        ImageError: the store can't be read.
    """
    if not store.images.is_dir():
        return []
    try:
        now_s = files.server_time_s(store.images)
    except OSError:  # a store that others fill: without its clock, by the newest file in it
        now_s = max((path.stat().st_mtime for path in store.list_images()), default=0.0)
    names: dict[Path, list[str]] = {}
    for ref in store.list_refs():
        names.setdefault(store.image_path(ref.digest, ref.platform), []).append(ref.reference)
    found = []
    for path in store.list_images():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        facts = store.read_facts(path)
        found.append(
            Listed(
                path,
                tuple(names.get(path, ())),
                facts.digest if facts else "",
                facts.platform if facts else "",
                status.st_size,
                facts.fetched_at if facts else 0.0,
                max(0.0, now_s - status.st_mtime),
            )
        )
    return sorted(found, key=lambda image: (not image.names, image.names, image.path.name))


@dataclass(frozen=True)
class Checked:
    """One image or toolbox, and what is wrong with it (empty: nothing)."""

    path: Path
    name: str
    wrong: str


def verify(store: Store, on_each: Callable[[Checked], None]) -> list[Checked]:
    """Read all of every image and every toolbox and compare with what was written down when they were made.

    Raises:
        ImageError: the store can be written by everybody.
    """
    store.require_trusted()
    found = []
    for image in list_images(store):
        try:
            wrong = _what_is_wrong(store, image)
        except OSError as error:
            wrong = f"it can't be read: {error.strerror}"
        found.append(Checked(image.path, ", ".join(image.names) or image.path.name, wrong))
        on_each(found[-1])
    for tree in toolbox.list_toolboxes(store.root):
        found.append(Checked(tree, tree.name, "; ".join(toolbox.verify_toolbox(tree)[:3])))
        on_each(found[-1])
    return found


def _what_is_wrong(store: Store, image: Listed) -> str:
    facts = store.read_facts(image.path)
    if facts is None:
        return "nothing is known of it"
    if image.size_bytes != facts.size_bytes:
        return f"it has {image.size_bytes} bytes and should have {facts.size_bytes}"
    return "its content was changed" if sha256_of(image.path) != facts.sha256 else ""


@dataclass
class Pruned:
    """What was, or would be, removed: path and bytes each; and what could not be, in words."""

    removed: list[tuple[Path, int]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return sum(count for _, count in self.removed)


def prune(
    store: Store, *, unused_for_s: float | None, in_use: Iterable[Path], keep_toolbox: Path | None, dry_run: bool
) -> Pruned:
    """Remove what no fetch and no workspace needs: layers of finished fetches, halves of dead ones, names of images
    that are gone, images that no name means, toolboxes of other versions. Images that a name means only if asked to.

    Args:
        unused_for_s: images that nobody has taken for so long go too; None: none of them.
        in_use: images and toolboxes of living workspaces: never removed.
        keep_toolbox: this version's.
        dry_run: whether only to say what would go.

    Raises:
        ImageError: the store can't be written.
    """
    if not store.claims.is_dir():
        return Pruned()
    spared = {path.resolve() for path in in_use}
    pruned = Pruned()
    images = list_images(store)
    try:
        if not dry_run:
            claims.remove_abandoned(store.claims)
        for folder in _entries(store.work):
            if store.is_dead_work(folder):
                _remove(folder, pruned, dry_run)
        layers = _entries(store.layers)
        # A layer under a claim is being fetched or converted: all wait until nothing is. Asked after the list was made:
        # a layer that is being fetched since is not on it.
        if not any(claims.is_held(store.claims, name) for name in claims.names(store.claims)):
            for layer in layers:
                _remove(layer, pruned, dry_run)
        for image in images:
            is_old = unused_for_s is not None and image.unused_s >= unused_for_s
            is_nobodys = not image.names and image.unused_s >= _YOUNG_S
            if not (is_old or is_nobodys) or image.path.resolve() in spared:
                continue
            if not claims.is_held(store.claims, f"image-{image.path.stem}"):  # else somebody is fetching it anew
                _remove(image.path, pruned, dry_run)
                _remove(image.path.with_suffix(".json"), pruned, dry_run)
        gone = {path for path, _ in pruned.removed}
        for path, image_path in store.refs_with_images():
            if image_path in gone or not image_path.exists():
                _remove(path, pruned, dry_run)
        for facts in _entries(store.images, "*.json"):
            if not facts.with_suffix(".sif").exists() and _age_s(facts) > _YOUNG_S:
                _remove(facts, pruned, dry_run)
        for tree in _useless_toolboxes(store.root, spared, keep_toolbox):
            # Out of sight first: nobody may find a manifest in a tree that is half gone.
            _remove(tree if dry_run else toolbox.set_aside(tree), pruned, dry_run)
    except OSError as error:
        raise unwritable(store.root, error) from error
    return pruned


def _useless_toolboxes(root: Path, spared: set[Path], keep: Path | None) -> list[Path]:
    """Toolboxes of other versions that nobody has used for two days (use is noted to a day), and halves of a day."""
    whole = [path for path in toolbox.list_toolboxes(root) if path != keep and path.resolve() not in spared]
    old = [path for path in whole if _age_s(_marker(path)) > 2 * _YOUNG_S]
    return sorted([*old, *(path for path in toolbox.list_parts(root) if _age_s(path) > _YOUNG_S)])


def _entries(folder: Path, pattern: str = "*") -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:  # a store that is just being made
        return []


def _age_s(path: Path) -> float:
    """As `files.age_s`; what somebody else has just removed is young: nothing is left to be done about it."""
    try:
        return files.age_s(path)
    except FileNotFoundError:
        return 0.0


def _marker(tree: Path) -> Path:
    """What is touched when a toolbox is used."""
    return tree / toolbox.MANIFEST if (tree / toolbox.MANIFEST).exists() else tree


def _remove(path: Path, pruned: Pruned, dry_run: bool) -> None:
    try:
        size = _size_of(path)
        if not dry_run:
            remove_tree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        pruned.left.append(f"{path}: {error.strerror}")
        return
    pruned.removed.append((path, size))


def _size_of(path: Path) -> int:
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(below.lstat().st_size for below in path.rglob("*") if not below.is_dir())


def require_named(images: list[Listed], wanted: Iterable[str]) -> list[Listed]:
    """Those of `images` that one of `wanted` names, by reference, digest or its beginning; all where none is given.

    Raises:
        ImageError: one names nothing.
    """
    wanted = list(wanted)
    if not wanted:
        return images
    chosen = []
    for name in wanted:
        found = [image for image in images if name in image.names or _is_digest_of(name, image.digest)]
        if not found:
            raise ImageError(f"There is no image {name} in the store.", remedy="hpc-workspace images ls")
        chosen += found
    return chosen


def _is_digest_of(text: str, digest: str) -> bool:
    bare = text.removeprefix("sha256:")
    return len(bare) >= 6 and digest.removeprefix("sha256:").startswith(bare)
