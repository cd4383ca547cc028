"""Manifests: what an image in a registry is made of, and which of several is for this platform.

Source: OCI image specification 1.1 (manifest.md, image-index.md, image-layout.md); Docker's manifest v2, schema 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_workspace.errors import ImageError
from hpc_workspace.images.reference import Reference
from hpc_workspace.images.registry import (
    CONFIGS,
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    SIF_LAYER,
    Descriptor,
)


@dataclass(frozen=True)
class Source:
    """One image in a registry, for one platform.

    Attributes:
        digest: of its manifest.
        blobs: the configuration and the layers.
        sif: the one blob that is the SIF file itself; None for an image of layers.
    """

    digest: str
    media_type: str
    manifest: bytes
    blobs: tuple[Descriptor, ...]
    sif: Descriptor | None

    @property
    def size_bytes(self) -> int:
        return sum(blob.size_bytes for blob in {blob.digest: blob for blob in self.blobs}.values())


def parse_source(document: dict[str, Any], body: bytes, media_type: str, digest: str, reference: Reference) -> Source:
    """What a manifest names. Raises: ImageError: it is none that we can use."""
    named = OCI_MANIFEST if document.get("schemaVersion") == 2 else f"schema version {document.get('schemaVersion')}"
    kind = document.get("mediaType") or media_type or named
    if kind not in (OCI_MANIFEST, DOCKER_MANIFEST) or not isinstance(document.get("layers"), list):
        raise ImageError(
            f"Its manifest is of a kind that is not supported: {str(kind)[:100]}.",
            remedy="Have it pushed again by a present-day Docker, skopeo or apptainer.",
        )
    where = f"The manifest of {reference}"
    layers = [Descriptor.parse(layer, where) for layer in document["layers"]]
    if len(layers) == 1 and layers[0].media_type == SIF_LAYER:
        return Source(digest, kind, body, (layers[0],), sif=layers[0])
    config = Descriptor.parse(document.get("config"), where)
    # Old registries have configurations of no kind at all, and artefacts have layers of files too.
    is_artefact = config.media_type.startswith("application/vnd.") and config.media_type not in CONFIGS
    if is_artefact or not layers or not all("tar" in layer.media_type for layer in layers):
        raise ImageError("It is an artefact and no image: it has no layers of files.")
    return Source(digest, kind, body, (config, *layers), sif=None)


def choose_platform(index: dict[str, Any], platform: str, reference: Reference) -> str:
    """The digest of the manifest for `platform` in an OCI index or a Docker manifest list.

    Raises:
        ImageError: it has none; the error lists those that there are.
    """
    system, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    offered: list[str] = []
    fitting: list[tuple[bool, str]] = []
    entries = index.get("manifests")
    for entry in entries if isinstance(entries, list) else []:
        found = Descriptor.parse(entry, f"The index of {reference}")
        said = entry.get("platform")
        said = said if isinstance(said, dict) else {}
        if said.get("os") == "unknown":  # an attestation: a document about an image, and no image
            continue
        offered.append("/".join(str(said[key]) for key in ("os", "architecture", "variant") if said.get(key)))
        plain = ("", "v8") if architecture == "arm64" else ("",)  # two ways to say the same
        offered_variant = said.get("variant") or ""
        if (said.get("os"), said.get("architecture")) == (system, architecture) and (
            not variant or offered_variant == variant or (variant in plain and offered_variant in plain)
        ):
            fitting.append((offered_variant not in plain, found.digest))
    if not fitting:
        raise not_for(platform, offered)
    # Of several that fit the first counts: image-index.md of the OCI image specification.
    return min(fitting, key=lambda entry: entry[0])[1]


def not_for(platform: str, offered: list[str]) -> ImageError:
    return ImageError(
        f"It is not for {platform}.",
        evidence=f"It is for: {', '.join(dict.fromkeys(offered)) or 'nothing'}.",
        remedy="The option platform says which is meant.",
    )


def is_index(document: dict[str, Any], media_type: str) -> bool:
    return (document.get("mediaType") or media_type) in (OCI_INDEX, DOCKER_INDEX) or "manifests" in document


def parse_json(body: bytes, reference: Reference) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"What the registry sent of {reference} is not JSON.", evidence=str(error)) from error
    if not isinstance(document, dict):
        raise ImageError(f"What the registry sent of {reference} is not a JSON object.")
    return document


def write_layout(source: Source, layout: Path) -> None:
    """What makes an OCI image layout of a directory with its blobs; image-layout.md of the OCI image specification."""
    (layout / "blobs" / "sha256" / source.digest.removeprefix("sha256:")).write_bytes(source.manifest)
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    entry = {"mediaType": source.media_type, "digest": source.digest, "size": len(source.manifest)}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
