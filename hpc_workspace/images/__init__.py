"""Images: from what the user names to a file that a node can run, fetched once and published whole."""

from __future__ import annotations

from pathlib import Path

from hpc_workspace import apptainer
from hpc_workspace.config import ImageSettings, load_settings
from hpc_workspace.errors import ImageError
from hpc_workspace.images.fetch import FetchElsewhere, Fetcher
from hpc_workspace.images.progress import Tell
from hpc_workspace.images.reference import parse_image
from hpc_workspace.images.store import Store
from hpc_workspace.options import PullPolicy


def cache_dir(option: str | None) -> Path:
    """The SIF store: `cache_dir`, else the settings' (`$HPC_WORKSPACE_CACHE` first), else `~/.apptainer_cache`.

    Raises:
        ConfigError: a setting is wrong.
    """
    return Path(option or load_settings().workspace.cache_dir or "~/.apptainer_cache").expanduser().absolute()


def resolve(
    image: str,
    *,
    runtime: str,
    store: Path,
    platform: str,
    pull_policy: PullPolicy,
    settings: ImageSettings,
    tell: Tell,
    elsewhere: FetchElsewhere | None = None,
) -> str:
    """The path of the SIF file or sandbox directory for `image`, fetched if need be.

    Args:
        pull_policy: for references. `missing`: what the store has is taken. `newer`: the registry is asked, and what
            it has now is fetched unless the store has that; a registry that can't be asked is no error if the store has
            an image. `always`: fetched anew. `never`: what the store has, or an error.
        elsewhere: as in `Fetcher`.

    Raises:
        ConfigError: `image` is no path and no reference.
        ImageError: it is missing, is no image, or can't be fetched.
        PrerequisiteError: it must be converted, and there is no Apptainer here.
    """
    named = parse_image(image)
    if isinstance(named, Path):
        apptainer.require_image(str(named))
        return str(named)
    place = Store(store)
    place.require_trusted()
    # An archive's content is its name: it is looked at, not remembered.
    found = None if named.is_local and pull_policy != "never" else place.find(named, platform)
    if pull_policy == "never" and found is None:
        raise ImageError(f"{named} is not in the store {store}.", remedy="Set pull_policy='missing' to fetch it.")
    if found is None or pull_policy in ("newer", "always"):
        fetcher = Fetcher(place, settings, runtime=runtime, platform=platform, tell=tell, elsewhere=elsewhere)
        found = fetcher.fetch(named, pull_policy)
    place.note_use(found)
    return str(found)
