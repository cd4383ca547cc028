"""A plan: what it takes to have many images, before any of them is fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_workspace.errors import ConfigError, ImageError
from hpc_workspace.images.fetch import Fetcher
from hpc_workspace.images.manifest import Source
from hpc_workspace.images.reference import Reference, parse_image
from hpc_workspace.images.registry import RateLimit, Registry

_QUESTIONS_AT_ONCE = 8
# An index and a manifest of it; a repository without an index takes one.
_PULLS_AN_IMAGE = 2
_LARGEST_LINE = 1024 * 1024


@dataclass(frozen=True)
class Planned:
    """One image of a plan.

    Attributes:
        state: `here`, `missing`, or `error`.
        uses: how many tasks want it.
        download_bytes: what is still to come for it alone; None where that is not known before it is fetched.
        error: why it can't be had; empty if it can.
    """

    image: str
    state: str
    uses: int
    download_bytes: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """What many images take.

    Attributes:
        images: each once.
        download_bytes: what is to come for all: layers that images share count once.
        rate_limits: by registry, as it says itself.
        wait_s: how long the pulls that are still to be made must at least take at those limits; 0 where there is none.
            Making the plan pulls manifests already, as far as that leaves half of what is left.
    """

    images: tuple[Planned, ...]
    download_bytes: int
    rate_limits: Mapping[str, RateLimit] = field(default_factory=dict)
    wait_s: float = 0.0


def read_references(path: Path) -> dict[str, int]:
    """The images that a file asks for, and how often: one reference a line, or JSON lines with an `image` each.

    Blank lines, and lines that begin with `#`, count for nothing.

    Raises:
        ConfigError: it can't be read, or a line names no image; it says which.
    """
    found: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read.", option="FILE", evidence=str(error)) from error
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        image = _image_of(text, path, number)
        found[image] = found.get(image, 0) + 1
    return found


def _image_of(text: str, path: Path, number: int) -> str:
    if not text.startswith("{"):
        return text
    try:
        image: Any = json.loads(text[:_LARGEST_LINE]).get("image")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}, is not JSON.", option="FILE", evidence=str(error)) from error
    if not isinstance(image, str) or not image:
        raise ConfigError(
            f'{path}, line {number}, has no "image".', option="FILE", remedy='Write {"id": …, "image": "docker://…"}.'
        )
    return image


def make_plan(fetcher: Fetcher, wanted: Mapping[str, int]) -> Plan:
    """Ask the registries about every image that is not in the store. Manifests are kept, so that no pull is wasted.

    Args:
        wanted: each image, and how many tasks want it.

    Raises:
        ConfigError: one of them is no image's name.
        ImageError: the store can't be used.
    """
    fetcher.store.prepare()
    planned: list[Planned] = []
    missing: dict[str, list[tuple[str, Reference]]] = {}
    for image, uses in wanted.items():
        named = parse_image(image)
        if isinstance(named, Path):
            is_there = named.exists()
            planned.append(Planned(image, "here" if is_there else "error", uses, error="" if is_there else "not there"))
        elif fetcher.store.find(named, fetcher.platform) is not None:
            planned.append(Planned(image, "here", uses))
        elif named.is_of_registry:
            missing.setdefault(named.registry, []).append((image, named))
        else:
            planned.append(Planned(image, "missing", uses))
    layers: dict[str, int] = {}
    limits: dict[str, RateLimit] = {}
    wait_s = 0.0
    for host, references in missing.items():
        with fetcher.open_registry(host) as registry:
            answers = _ask(fetcher, registry, [named for _, named in references])
            for (image, _), source in zip(references, answers, strict=True):
                planned.append(_planned(fetcher, image, wanted[image], source, layers))
            if (limit := registry.rate_limit) is not None:
                limits[host] = limit
                wait_s = max(wait_s, seconds_at(limit, _PULLS_AN_IMAGE * answers.count(None)))
    return Plan(tuple(sorted(planned, key=lambda p: p.image)), sum(layers.values()), limits, wait_s)


def seconds_at(limit: RateLimit, pulls: int) -> float:
    """How long so many pulls must take at least."""
    left = limit.pulls if limit.remaining is None else limit.remaining
    return max(0, pulls - left) / max(1, limit.pulls) * limit.window_s


def _ask(fetcher: Fetcher, registry: Registry, references: list[Reference]) -> list[Source | ImageError | None]:
    """What each reference means; None for those that would use up the half of what the registry still lets us pull."""

    def ask(reference: Reference) -> Source | ImageError:
        try:
            return fetcher.resolve(registry, reference)
        except ImageError as error:
            return error

    first = ask(references[0])
    limit = registry.rate_limit
    budget = len(references)
    if limit is not None:
        left = limit.pulls if limit.remaining is None else limit.remaining
        budget = max(1, min(budget, left // 2 // _PULLS_AN_IMAGE))
    with ThreadPoolExecutor(_QUESTIONS_AT_ONCE) as pool:
        others = list(pool.map(ask, references[1:budget]))
    return [first, *others, *[None] * (len(references) - budget)]


def _planned(
    fetcher: Fetcher, image: str, uses: int, source: Source | ImageError | None, layers: dict[str, int]
) -> Planned:
    if source is None:
        return Planned(image, "missing", uses)
    if isinstance(source, ImageError):
        return Planned(image, "error", uses, error=source.what)
    if fetcher.store.find_digest(source.digest, fetcher.platform) is not None:
        return Planned(image, "here", uses)
    missing = {b.digest: b.size_bytes for b in source.blobs if not fetcher.store.has_layer(b.digest, b.size_bytes)}
    layers |= missing
    return Planned(image, "missing", uses, sum(missing.values()))
