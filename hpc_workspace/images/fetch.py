"""A fetch: one image from its source into the store, once, however many ask for it at the same time.

Three claims, each inside the one before: the name (so that one asks the registry), the image (two names may mean the
same one), and each blob (two images may share layers).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_workspace import apptainer, claims, files
from hpc_workspace.config import ImageSettings
from hpc_workspace.errors import ImageError, WorkspaceError
from hpc_workspace.images.archives import digest_of_archive
from hpc_workspace.images.convert import Limits, convert, pull
from hpc_workspace.images.credentials import find_credentials
from hpc_workspace.images.progress import Step, Tell
from hpc_workspace.images.reference import Reference
from hpc_workspace.images.registry import (
    CONFIGS,
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    SIF_LAYER,
    Descriptor,
    Registry,
    TransferCutError,
)
from hpc_workspace.images.store import Store, ref_key, require_platform, sha256_of, unwritable
from hpc_workspace.options import PullPolicy
from hpc_workspace.text import format_bytes

log = logging.getLogger(__name__)

FetchElsewhere = Callable[[Reference, str, PullPolicy], None]
_WAIT_TIMEOUT_S = 12 * 3600.0
_BLOBS_AT_ONCE = 3
_CUTS_WITHOUT_PROGRESS = 5
_GATHERINGS = 8
# Of the compressed layers' size: the SIF is about as large, the unpacked tree up to some four times.
_SIF_RATIO, _TREE_RATIO = 1.1, 3.5


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


class Fetcher:
    """Fetches into one store, for one platform.

    Args:
        runtime: as the option: auto, apptainer or singularity.
        platform: as OCI writes it, such as linux/amd64.
        tell: told where a fetch is, from several threads, often.
        elsewhere: fetches on another node that shares the store, where there is no network here; None: done here.

    Raises:
        ConfigError: `platform` is none.
    """

    def __init__(
        self,
        store: Store,
        settings: ImageSettings,
        *,
        runtime: str,
        platform: str,
        tell: Tell,
        elsewhere: FetchElsewhere | None = None,
    ) -> None:
        require_platform(platform)
        self.store = store
        self.platform = platform
        self._settings = settings
        self._runtime = runtime
        self._tell = tell
        self._elsewhere = elsewhere

    def fetch(self, reference: Reference, policy: PullPolicy) -> Path:
        """The image in the store, fetched as far as `policy` asks for it. `never` is the caller's matter.

        Raises:
            ImageError: it can't be fetched; the message begins as upstream's does.
            PrerequisiteError: there is no runtime to convert it.
        """
        self.store.prepare()
        asked_before = self.store.asked_at_s(reference, self.platform)

        def find() -> Path | None:
            # Who is asked to look again takes only what somebody found since: that is as new as our own look would be.
            if policy != "missing" and self.store.asked_at_s(reference, self.platform) == asked_before:
                return None
            return self.store.find(reference, self.platform)

        try:
            if reference.is_local:
                return self._from_archive(reference, policy)
            # The one who fetches elsewhere takes the claim `ref-…` there: here another one says who sent it.
            what = "ref" if self._elsewhere is None else "job"
            name = f"{what}-{ref_key(reference, self.platform)}"
            return self._once(name, reference, find, lambda: self._make(reference, policy))
        except OSError as error:
            if isinstance(error, WorkspaceError):
                raise
            raise failed(reference, unwritable(self.store.root, error)) from error
        except ImageError as error:
            raise failed(reference, error) from error

    def _once(self, name: str, reference: Reference, find: Callable[[], Path | None], make: Callable[[], Path]) -> Path:
        def say(holder: str) -> None:
            self._tell(Step(str(reference), f"waiting for {holder}, which fetches it"))

        try:
            return claims.once(self.store.claims, name, find=find, make=make, on_wait=say, timeout_s=_WAIT_TIMEOUT_S)
        except TimeoutError as error:
            raise ImageError("Somebody else fetches it and does not finish.", evidence=str(error)) from error

    def _make(self, reference: Reference, policy: PullPolicy) -> Path:
        if self._elsewhere is not None:
            return self._from_other_node(self._elsewhere, reference, policy)
        if reference.is_of_registry:
            return self._from_registry(reference, policy)
        return self._from_elsewhere(reference)

    def _from_registry(self, reference: Reference, policy: PullPolicy) -> Path:
        known = self.store.find(reference, self.platform)
        with self.open_registry(reference.registry, reference) as registry:
            try:
                source = self.resolve(registry, reference)
            except ImageError as error:
                if policy != "newer" or known is None:
                    raise
                # As podman-pull(1) does: an image that is there is not refused because its registry is silent.
                log.warning("%s: taking what the store has, since the registry can't be asked: %s", reference, error)
                return known
            return self._publish_once(
                reference, source.digest, policy, lambda: self._from_layers(registry, reference, source, policy)
            )

    def _from_other_node(self, elsewhere: FetchElsewhere, reference: Reference, policy: PullPolicy) -> Path:
        elsewhere(reference, self.platform, policy)
        path = self.store.find(reference, self.platform)
        if path is None:
            raise ImageError(
                "It was fetched on another node, and is not here.",
                remedy=f"Is the store {self.store.root} on a disk that all nodes share?",
            )
        return path

    def _publish_once(self, reference: Reference, digest: str, policy: PullPolicy, make: Callable[[], Path]) -> Path:
        """The image with this digest, made if need be, and the name's file that says so."""
        path = self._once(
            f"image-{self.store.claim_name(digest, self.platform)}",
            reference,
            lambda: self.store.find_digest(digest, self.platform) if policy != "always" else None,
            make,
        )
        self.store.write_ref(reference, self.platform, digest)
        return path

    @contextmanager
    def open_registry(self, host: str, reference: Reference | None = None) -> Iterator[Registry]:
        """The registry, as the settings and the environment say how to speak to it."""
        everywhere = any(
            os.environ.get(f"{prefix}_NOHTTPS", "").lower() in ("1", "true") for prefix in ("APPTAINER", "SINGULARITY")
        )
        with Registry(
            host,
            plain_http=everywhere or host in self._settings.plain_http,
            find_credentials=lambda repository: find_credentials(host, repository),
            on_wait=lambda text: self._tell(Step(str(reference or host), text)),
        ) as registry:
            yield registry

    def resolve(self, registry: Registry, reference: Reference) -> Source:
        """What a name means now, for our platform. Manifests are kept as layers are, so that none is fetched twice.

        Raises:
            ImageError: there is none, or the registry does not give it.
        """
        self._tell(Step(str(reference), f"asking {registry.host}"))
        digest = registry.digest_of(reference)
        body, media_type, digest = self._manifest(registry, reference, digest or reference.version)
        document = _parse_json(body, reference)
        if _is_index(document, media_type):
            chosen = choose_platform(document, self.platform, reference)
            body, media_type, digest = self._manifest(registry, reference, chosen)
            document = _parse_json(body, reference)
        return parse_source(document, body, media_type, digest, reference)

    def _manifest(self, registry: Registry, reference: Reference, version: str) -> tuple[bytes, str, str]:
        if version.startswith("sha256:"):
            path = self.store.layer_path(version)
            if path.name in os.listdir(self.store.layers):
                body = path.read_bytes()
                if f"sha256:{hashlib.sha256(body).hexdigest()}" == version:
                    return body, "", version
        body, media_type, digest = registry.manifest(reference, version)
        files.write_whole(self.store.layer_path(digest), body, self.store.file_mode)
        return body, media_type, digest

    def _from_layers(self, registry: Registry, reference: Reference, source: Source, policy: PullPolicy) -> Path:
        runtime = None if source.sif else apptainer.choose_runtime(self._runtime)
        if policy == "always":
            for blob in source.blobs:
                self.store.layer_path(blob.digest).unlink(missing_ok=True)
        self._require_room(source)
        self._download(registry, reference, source)
        with self.store.working_directory() as work:
            blobs = work / "layout" / "blobs" / "sha256"
            self._gather(registry, reference, source, blobs)
            if runtime is None:
                assert source.sif is not None
                aside = self._require_unchanged(blobs / self.store.layer_path(source.sif.digest).name)
                apptainer.require_image(str(aside))
            else:
                self._require_platform(reference, source, blobs)
                _lay_out(source, work / "layout")
                aside = self._convert("oci:layout", reference, work, runtime)
            return self.store.publish(aside, reference, source.digest, self.platform)

    def _require_unchanged(self, sif: Path) -> Path:
        """Raises: ImageError: it is not what its name says. Under another name the same file is a published image."""
        if sha256_of(sif) != sif.name:
            (self.store.layers / sif.name).unlink(missing_ok=True)
            raise ImageError(
                "What the store has of it was changed since it was fetched: it was thrown away.",
                remedy="Try again: it is fetched anew then.",
            )
        return sif

    def _gather(self, registry: Registry, reference: Reference, source: Source, folder: Path) -> None:
        """Every blob in `folder` too, where nobody's clearing up takes it away from us."""
        folder.mkdir(parents=True)
        for blob in source.blobs:
            path = self.store.layer_path(blob.digest)
            for tries_left in reversed(range(_GATHERINGS)):
                try:
                    if not (folder / path.name).exists():
                        _link_or_copy(path, folder / path.name)
                    break
                except FileNotFoundError:  # since it came, somebody threw it away to fetch it anew
                    if not tries_left:
                        raise
                    self._download(registry, reference, source)

    def _convert(self, source: str, reference: Reference, work: Path, runtime: apptainer.Runtime) -> Path:
        return convert(
            source,
            work,
            runtime=runtime,
            limits=Limits(self._settings, os.environ),
            on_wait=lambda: self._tell(Step(str(reference), "converting to SIF")),
        )

    def _require_room(self, source: Source) -> None:
        """Raises: ImageError: the store's disk, or the one for temporary files, has not the room that a fetch takes."""
        missing = sum(b.size_bytes for b in source.blobs if not self.store.has_layer(b.digest, b.size_bytes))
        if source.sif is not None:
            require_room({self.store.root: missing}, what="download it")
            return
        tmpdir = os.environ.get("APPTAINER_TMPDIR") or os.environ.get("SINGULARITY_TMPDIR") or self.store.root
        tree = int(source.size_bytes * _TREE_RATIO)
        sif = int(source.size_bytes * _SIF_RATIO)
        needs = {self.store.root: missing + sif}
        needs[Path(tmpdir)] = needs.get(Path(tmpdir), 0) + tree
        require_room(needs, what=f"download {format_bytes(missing)}, unpack and convert it")

    def _download(self, registry: Registry, reference: Reference, source: Source) -> None:
        """Get every blob that is not here yet, several at once."""
        blobs = list({blob.digest: blob for blob in source.blobs}.values())
        missing = [blob for blob in blobs if not self.store.has_layer(blob.digest, blob.size_bytes)]
        if not missing:
            return
        meter = _Meter(self._tell, reference, sum(blob.size_bytes for blob in missing))
        download = _Download(self.store, registry, reference, meter)
        # The largest first: what is fetched last is fetched alone.
        missing.sort(key=lambda blob: -blob.size_bytes)
        with ThreadPoolExecutor(_BLOBS_AT_ONCE, thread_name_prefix="layer") as pool:
            tasks = [pool.submit(download.ensure, blob) for blob in missing]
            try:
                for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                    task.result()
            except BaseException:
                download.give_up()
                pool.shutdown(cancel_futures=True)
                raise

    def _require_platform(self, reference: Reference, source: Source, blobs: Path) -> None:
        """Raises: ImageError: the image says that it is for another machine."""
        config = _parse_json((blobs / self.store.layer_path(source.blobs[0].digest).name).read_bytes(), reference)
        system, _, rest = self.platform.partition("/")
        found = (config.get("os", system), config.get("architecture", rest.partition("/")[0]))
        if found != (system, rest.partition("/")[0]):
            raise _not_for(self.platform, ["/".join(map(str, found))])

    def _from_archive(self, reference: Reference, policy: PullPolicy) -> Path:
        self._tell(Step(str(reference), "reading"))
        digest = digest_of_archive(reference)
        return self._publish_once(reference, digest, policy, lambda: self._convert_archive(reference, digest))

    def _convert_archive(self, reference: Reference, digest: str) -> Path:
        runtime = apptainer.choose_runtime(self._runtime)
        with self.store.working_directory() as work:
            # Under a name without the colons and commas that the runtime would read its own way.
            (work / "source").symlink_to(reference.repository)
            aside = self._convert(f"{reference.scheme}:source", reference, work, runtime)
            return self.store.publish(aside, reference, digest, self.platform)

    def _from_elsewhere(self, reference: Reference) -> Path:
        """What only the runtime can fetch; its digest is the file's own."""
        with self.store.working_directory() as work:
            aside = pull(
                str(reference),
                work,
                runtime=apptainer.choose_runtime(self._runtime),
                arch=self.platform.partition("/")[2],
                limits=Limits(self._settings, os.environ),
                on_wait=lambda: self._tell(Step(str(reference), "fetching")),
            )
            digest = f"sha256:{sha256_of(aside)}"
            path = self.store.publish(aside, reference, digest, self.platform)
        self.store.write_ref(reference, self.platform, digest)
        return path


class _Meter:
    """How many bytes have come, of all blobs of one image."""

    def __init__(self, tell: Tell, reference: Reference, total_bytes: int) -> None:
        self._tell = tell
        self._reference = str(reference)
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._lock = threading.Lock()
        self.add(0)

    def add(self, count: int) -> None:
        with self._lock:
            self._done_bytes += count
            step = Step(self._reference, "downloading", self._done_bytes, self._total_bytes)
        self._tell(step)


class _Download:
    """Blobs of one image, from one registry into the store."""

    def __init__(self, store: Store, registry: Registry, reference: Reference, meter: _Meter) -> None:
        self._store = store
        self._registry = registry
        self._reference = reference
        self._meter = meter
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """Have every transfer end at its next chunk."""
        self._given_up.set()

    def ensure(self, blob: Descriptor) -> None:
        """The blob in the store, whole and checked. Raises: ImageError: it can't be had."""
        path = self._store.layer_path(blob.digest)

        def find() -> Path | None:
            if self._given_up.is_set():
                raise ImageError("It was given up.")
            return path if self._store.has_layer(blob.digest, blob.size_bytes) else None

        claims.once(
            self._store.claims,
            f"layer-{path.name}",
            find=find,
            make=lambda: self._fetch(blob, path),
            on_wait=lambda holder: log.info("layer %s: waiting for %s", path.name[:12], holder),
            timeout_s=_WAIT_TIMEOUT_S,
        )

    def _fetch(self, blob: Descriptor, path: Path) -> Path:
        """Fetch the blob beside its place, going on where a broken connection, or a killed process, left off."""
        part = path.with_suffix(".part")
        self._meter.add(_size(part))
        for _ in range(2):  # what an earlier one left may be wrong: then all of it is fetched again
            self._complete(blob, part)
            try:
                if sha256_of(part) == path.name:
                    files.flush(part)
                    part.replace(path)
                    return path
                self._meter.add(-_size(part))
                part.unlink()
            except FileNotFoundError:  # who took us for dead was faster, or somebody cleared it away
                if self._store.has_layer(blob.digest, blob.size_bytes):
                    return path
        raise ImageError(
            f"{self._registry.host} sent something else than {blob.digest}: it was thrown away.",
            remedy="Try again; if it stays so, the registry or a proxy on the way is broken.",
        )

    def _complete(self, blob: Descriptor, part: Path) -> None:
        """Fetch what is missing of `part`, over as many connections as it takes."""
        cuts = 0
        most = _size(part)  # where a registry can't go on, every connection begins anew
        while not part.exists() or _size(part) < blob.size_bytes:
            try:
                self._append(blob, part, _size(part))
            except TransferCutError as error:
                cuts = 0 if _size(part) > most else cuts + 1
                most = max(most, _size(part))
                if cuts >= _CUTS_WITHOUT_PROGRESS:
                    raise ImageError(
                        f"{self._registry.host} cut the connection again and again.",
                        evidence=str(error),
                        remedy="Try again: what has come so far is kept.",
                    ) from error

    def _append(self, blob: Descriptor, part: Path, offset: int) -> None:
        """Fetch what follows the `offset` bytes that are there. Raises: TransferCutError: not all came."""
        with self._registry.blob(self._reference, blob.digest, offset) as (start, chunks):
            self._meter.add(start - offset)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
            with os.fdopen(os.open(part, flags, self._store.file_mode), "wb") as file:
                file.truncate(start)
                file.seek(start)
                for chunk in chunks:
                    if self._given_up.is_set():
                        raise ImageError("It was given up.")
                    if file.tell() + len(chunk) > blob.size_bytes:
                        raise ImageError(
                            f"{self._registry.host} sends more than the {blob.size_bytes} bytes of {blob.digest}."
                        )
                    file.write(chunk)
                    self._meter.add(len(chunk))
                came = file.tell()
        if came < blob.size_bytes:
            raise TransferCutError(f"{came} of {blob.size_bytes} bytes came")


def failed(reference: Reference, cause: ImageError) -> ImageError:
    """The error of a fetch, in the words that upstream's ApptainerWorkspace uses, with its cause."""
    prefix = "Failed to pull and convert Docker image"
    if cause.what.startswith(prefix):
        return cause
    return ImageError(f"{prefix} {reference}: {cause.what}", evidence=cause.evidence, remedy=cause.remedy)


def require_room(needs: dict[Path, int], *, what: str) -> None:
    """Make sure that each directory's disk has so many bytes of room; needs on the same disk add up.

    Raises:
        ImageError: one has not.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, count in needs.items():
        device = folder.stat().st_dev
        disks[device] = (folder, disks.get(device, (folder, 0))[1] + count)
    for folder, count in disks.values():
        free = shutil.disk_usage(folder).free
        if free < count:
            raise ImageError(
                f"There is not enough room in {folder} to {what}.",
                evidence=f"It takes about {format_bytes(count)}; {format_bytes(free)} are free.",
                remedy="hpc-workspace images prune makes room; cache_dir (HPC_WORKSPACE_CACHE) names another place.",
            )


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
        raise _not_for(platform, offered)
    # Of several that fit the first counts: image-index.md of the OCI image specification.
    return min(fitting, key=lambda entry: entry[0])[1]


def _not_for(platform: str, offered: list[str]) -> ImageError:
    return ImageError(
        f"It is not for {platform}.",
        evidence=f"It is for: {', '.join(dict.fromkeys(offered)) or 'nothing'}.",
        remedy="The option platform says which is meant.",
    )


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


def _is_index(document: dict[str, Any], media_type: str) -> bool:
    return (document.get("mediaType") or media_type) in (OCI_INDEX, DOCKER_INDEX) or "manifests" in document


def _parse_json(body: bytes, reference: Reference) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"What the registry sent of {reference} is not JSON.", evidence=str(error)) from error
    if not isinstance(document, dict):
        raise ImageError(f"What the registry sent of {reference} is not a JSON object.")
    return document


def _lay_out(source: Source, layout: Path) -> None:
    """What makes an OCI image layout of a directory with its blobs; image-layout.md of the OCI image specification."""
    (layout / "blobs" / "sha256" / source.digest.removeprefix("sha256:")).write_bytes(source.manifest)
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    entry = {"mediaType": source.media_type, "digest": source.digest, "size": len(source.manifest)}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def _link_or_copy(source: Path, target: Path) -> None:
    """`source` under a second name."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
