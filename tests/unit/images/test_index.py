"""Manifests and indexes: the right one for the platform, and what is no image is refused in few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_workspace.errors import ImageError
from hpc_workspace.images.registry import DOCKER_INDEX, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Descriptor
from tests.registry import Fault, Registry
from tests.unit.images.pulling import Puller, oras

NAME = "team/app"
ATTESTATION = {"os": "unknown", "architecture": "unknown"}


def docker(r: Registry) -> str:
    return f"docker://{r.host}/{NAME}:1"


def push_index(r: Registry, platforms: list[dict[str, str]], media: str = OCI_INDEX) -> list[str]:
    """An index whose entries are for `platforms`. Returns their digests, in this order."""
    entries = []
    for number, platform in enumerate(platforms):
        digest = r.push(NAME, "", files={"n": str(number).encode()})
        kind, data = r.content.manifests[NAME, digest]
        entries.append({"mediaType": kind, "digest": digest, "size": len(data), "platform": platform})
    r.content.add_manifest(NAME, "1", {"mediaType": media, "manifests": entries})
    return [entry["digest"] for entry in entries]


def platform_of(text: str) -> dict[str, str]:
    return dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False))


@pytest.mark.parametrize("media", ["oci", "docker"])
@pytest.mark.parametrize("platform", ["linux/amd64", "linux/arm64/v8", "linux/arm64", "linux/ppc64le"])
def test_the_image_for_the_platform_is_chosen(r: Registry, root: Path, media: Any, platform: str) -> None:
    platforms = ["linux/s390x", "linux/arm64/v8", "linux/amd64", "linux/ppc64le", "windows/amd64"]
    r.push(NAME, "1", files={"a": b"b"}, platforms=platforms, media=media)
    wanted = "linux/arm64/v8" if platform == "linux/arm64" else platform
    source = Puller(root, r, platform=platform).resolve(docker(r))
    assert source.digest == r.platforms(NAME, "1")[wanted]
    assert source.media_type == (OCI_MANIFEST if media == "oci" else DOCKER_MANIFEST)
    assert len(source.blobs) == 2
    assert source.sif is None


@pytest.mark.parametrize(
    ("platform", "offered", "chosen"),
    [
        ("linux/arm64/v8", ["linux/arm64"], 0),  # two ways to say the same
        ("linux/arm64", ["linux/arm64/v9", "linux/arm64/v8"], 1),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v3"], 1),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v6"], 1),
        ("linux/amd64", ["unknown/unknown", "linux/amd64", "unknown/unknown"], 1),
        ("linux/amd64", ["linux/amd64", "linux/amd64", "linux/amd64"], 0),  # of several, the first
        ("linux/amd64", ["linux/386", "linux/amd64", "linux/amd64"], 1),
    ],
)
def test_the_entry_that_fits_best_is_chosen(
    r: Registry, root: Path, platform: str, offered: list[str], chosen: int
) -> None:
    digests = push_index(r, [platform_of(text) for text in offered])
    assert Puller(root, r, platform=platform).resolve(docker(r)).digest == digests[chosen]


@pytest.mark.parametrize("platform", ["linux/arm64", "linux/arm/v7", "linux/amd64/v2"])
def test_where_no_entry_fits_the_error_lists_those_that_there_are(r: Registry, root: Path, platform: str) -> None:
    push_index(r, [platform_of("linux/amd64"), platform_of("linux/arm/v6"), ATTESTATION], media=DOCKER_INDEX)
    with pytest.raises(ImageError, match=f"not for {platform}") as caught:
        Puller(root, r, platform=platform).resolve(docker(r))
    assert caught.value.evidence == "It is for: linux/amd64, linux/arm/v6."
    assert "platform" in caught.value.remedy
    assert not r.seen("/blobs/")


def test_an_index_without_platforms_offers_nothing(r: Registry, pull: Puller) -> None:
    push_index(r, [ATTESTATION])
    with pytest.raises(ImageError, match="not for linux/amd64") as caught:
        pull.resolve(docker(r))
    assert caught.value.evidence == "It is for: nothing."


@pytest.mark.parametrize("keep_kind", [True, False], ids=["with mediaType", "without"])
def test_a_manifest_is_understood_again_when_it_is_in_the_store(r: Registry, pull: Puller, keep_kind: bool) -> None:
    r.push(NAME, "1", files={"a": b"b"}, platforms=["linux/amd64"])
    if not keep_kind:  # which the OCI specification allows
        for key, (kind, data) in list(r.content.manifests.items()):
            if kind == OCI_MANIFEST:
                document = json.loads(data)
                del document["mediaType"]
                del r.content.manifests[key]
                data = json.dumps(document).encode()
                digest = r.content.add_blob(data, kind)["digest"]
                r.content.manifests[NAME, digest] = (kind, data)
                entry = {"mediaType": kind, "digest": digest, "size": len(data), "platform": platform_of("linux/amd64")}
                r.content.add_manifest(NAME, "1", {"mediaType": OCI_INDEX, "manifests": [entry]})
    first = pull.resolve(docker(r))
    r.requests.clear()
    assert pull.resolve(docker(r)) == first
    assert [q.method for q in r.requests] == ["HEAD"]


def schema1(r: Registry) -> None:
    document = {"schemaVersion": 1, "name": NAME, "tag": "1", "fsLayers": [{"blobSum": "sha256:" + "0" * 64}] * 500}
    data = json.dumps(document, indent=3).encode()
    digest = r.content.add_blob(data, "x")["digest"]
    for reference in ("1", digest):
        r.content.manifests[NAME, reference] = ("application/vnd.docker.distribution.manifest.v1+prettyjws", data)


def helm_chart(r: Registry) -> None:
    config = r.content.add_blob(b"{}", "application/vnd.cncf.helm.config.v1+json")
    layer = r.content.add_blob(b"chart", "application/vnd.cncf.helm.chart.content.v1.tar+gzip")
    r.content.add_manifest(NAME, "1", {"mediaType": OCI_MANIFEST, "config": config, "layers": [layer]})


def signature(r: Registry) -> None:
    config = r.content.add_blob(b"{}", "application/vnd.oci.empty.v1+json")
    layer = r.content.add_blob(b"{}", "application/vnd.dev.cosign.simplesigning.v1+json")
    r.content.add_manifest(NAME, "1", {"mediaType": OCI_MANIFEST, "config": config, "layers": [layer]})


def no_layers(r: Registry) -> None:
    config = r.content.add_blob(b"{}", "application/vnd.oci.image.config.v1+json")
    r.content.add_manifest(NAME, "1", {"mediaType": OCI_MANIFEST, "config": config, "layers": []})


def nested_index(r: Registry) -> None:
    inner = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
    digest = r.content.add_blob(inner, OCI_INDEX)["digest"]
    r.content.manifests[NAME, digest] = (OCI_INDEX, inner)
    entry = {"mediaType": OCI_INDEX, "digest": digest, "size": len(inner), "platform": platform_of("linux/amd64")}
    r.content.add_manifest(NAME, "1", {"mediaType": OCI_INDEX, "manifests": [entry]})


@pytest.mark.parametrize(
    ("push", "why"),
    [
        (schema1, "not supported: application/vnd.docker.distribution.manifest.v1"),
        (helm_chart, "an artefact and no image"),
        (signature, "an artefact and no image"),
        (no_layers, "an artefact and no image"),
        (nested_index, "not supported: application/vnd.oci.image.index.v1"),
    ],
)
def test_what_is_no_image_is_an_error_in_one_screen(r: Registry, pull: Puller, push: Any, why: str) -> None:
    push(r)
    with pytest.raises(ImageError, match=why) as caught:
        pull.fetch(docker(r))
    assert len(str(caught.value)) < 500
    assert len(str(caught.value).splitlines()) <= 5
    assert not r.seen("/blobs/")
    with pytest.raises(ImageError) as again:  # now from the store
        pull.fetch(docker(r))
    assert "application/vnd.oci.image.manifest" not in again.value.what


def test_an_old_registrys_configuration_of_no_kind_is_taken(r: Registry, pull: Puller) -> None:
    config = r.content.add_blob(b"{}", "application/octet-stream")
    layer = r.content.add_blob(b"x", "application/vnd.docker.image.rootfs.diff.tar.gzip")
    r.content.add_manifest(NAME, "1", {"mediaType": DOCKER_MANIFEST, "config": config, "layers": [layer]})
    assert len(pull.resolve(docker(r)).blobs) == 2


@pytest.mark.parametrize(
    "descriptor",
    [
        {"digest": "sha256:../../../../x"},
        {"digest": "sha256:" + "A" * 64},
        {"digest": "sha256:" + "0" * 64 + "\n"},
        {"digest": "md5:" + "0" * 32},
        {"digest": "sha512:" + "0" * 128},
        {"digest": ""},
        {"digest": None},
        {"digest": ["sha256:" + "0" * 64]},
        {"size": -1},
        {"size": "5"},
        {"size": True},
        {"size": 1.5},
        {"size": 10**400},
        {"mediaType": None},
    ],
    ids=str,
)
def test_a_descriptor_that_is_none_is_refused(descriptor: dict[str, Any]) -> None:
    good = {"mediaType": OCI_MANIFEST, "digest": "sha256:" + "0" * 64, "size": 5}
    assert Descriptor.parse(good, "It").size_bytes == 5
    with pytest.raises(ImageError, match=r"no valid descriptor|something else than sha256") as caught:
        Descriptor.parse(good | descriptor, "It")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("digest", ["sha256:../../../../x", "md5:" + "0" * 32])
@pytest.mark.parametrize("where", ["layer", "config", "index"])
def test_a_digest_that_would_be_a_path_is_refused(r: Registry, pull: Puller, where: str, digest: str) -> None:
    manifest = r.manifest(NAME, r.push(NAME, "1", files={"a": b"b"}))
    if where == "layer":
        manifest["layers"][0]["digest"] = digest
    elif where == "config":
        manifest["config"]["digest"] = digest
    else:
        entry = {"mediaType": OCI_MANIFEST, "digest": digest, "size": 5, "platform": platform_of("linux/amd64")}
        manifest = {"mediaType": OCI_INDEX, "manifests": [entry]}
    r.content.add_manifest(NAME, "1", manifest)
    with pytest.raises(ImageError, match="something else than sha256"):
        pull.fetch(docker(r))
    assert not r.seen("/blobs/")
    assert len(r.seen("GET")) == 1


@pytest.mark.parametrize(
    "body",
    [b"<html>log in to the hotel's network</html>", b"[1]", b"5", b"null", b"{", b"\xff", b"[" * 200_000, b"1" * 5000],
    ids=lambda body: body[:10].decode("ascii", "replace"),
)
@pytest.mark.parametrize("of_registry", [True, False], ids=["as a manifest", "in place of one"])
def test_what_is_no_manifest_at_all_is_refused(r: Registry, pull: Puller, body: bytes, of_registry: bool) -> None:
    if of_registry:
        r.content.manifests[NAME, "1"] = (OCI_MANIFEST, body)
        digest = r.content.add_blob(body, "x")["digest"]
        r.content.manifests[NAME, digest] = (OCI_MANIFEST, body)
    else:
        r.faults.append(Fault("status", status=200, body=body.decode("latin-1")))
    with pytest.raises(ImageError, match=r"not JSON|not a JSON object") as caught:
        pull.fetch(docker(r))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "document", [{"layers": 5}, {"layers": None}, {}, {"manifests": 5}, {"layers": [5]}, {"layers": [{}], "config": []}]
)
def test_a_manifest_of_a_wrong_shape_is_refused(r: Registry, pull: Puller, document: dict[str, Any]) -> None:
    r.content.add_manifest(NAME, "1", {"mediaType": OCI_MANIFEST, **document})
    with pytest.raises(ImageError):
        pull.fetch(docker(r))


def test_a_sif_for_another_machine_is_not_looked_into(r: Registry, pull: Puller) -> None:
    r.push_oras(NAME, "1", bytes(32) + b"SIF_MAGIC")
    assert pull.resolve(oras(r)).sif is not None


def test_an_oras_artefact_that_is_no_sif_is_refused_and_not_published(r: Registry, pull: Puller) -> None:
    r.push_oras(NAME, "1", b"something else")
    with pytest.raises(ImageError, match="is not a SIF file"):
        pull.fetch(oras(r))
    assert not list(pull.store.images.iterdir())
    assert not list(pull.store.refs.iterdir())
