"""A fetch: one image from its source into the store, once, however many ask for it at the same time.

Three claims, each inside the one before: the name (so that one asks the registry), the image (two names may mean the
same one), and each blob (two images may share layers).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from hpc_workspace import apptainer, claims, files
from hpc_workspace.config import ImageSettings
from hpc_workspace.errors import ImageError, WorkspaceError
from hpc_workspace.images.archives import digest_of_archive
from hpc_workspace.images.convert import Limits, convert, pull
from hpc_workspace.images.credentials import find_credentials
from hpc_workspace.images.download import Download, Meter
from hpc_workspace.images.manifest import (
    Source,
    choose_platform,
    is_index,
    not_for,
    parse_json,
    parse_source,
    write_layout,
)
from hpc_workspace.images.progress import Step, Tell
from hpc_workspace.images.reference import Reference
from hpc_workspace.images.registry import Registry
from hpc_workspace.images.store import Store, ref_key, require_platform, sha256_of, unwritable
from hpc_workspace.options import PullPolicy
from hpc_workspace.text import format_bytes

log = logging.getLogger(__name__)

FetchElsewhere = Callable[[Reference, str, PullPolicy], None]
_WAIT_TIMEOUT_S = 12 * 3600.0
_BLOBS_AT_ONCE = 3
_GATHERINGS = 8
# Of the compressed layers' size: the SIF is about as large, the unpacked tree up to some four times.
_SIF_RATIO, _TREE_RATIO = 1.1, 3.5


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
        document = parse_json(body, reference)
        if is_index(document, media_type):
            chosen = choose_platform(document, self.platform, reference)
            body, media_type, digest = self._manifest(registry, reference, chosen)
            document = parse_json(body, reference)
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
                write_layout(source, work / "layout")
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
        meter = Meter(self._tell, reference, sum(blob.size_bytes for blob in missing))
        download = Download(self.store, registry, reference, meter)
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
        config = parse_json((blobs / self.store.layer_path(source.blobs[0].digest).name).read_bytes(), reference)
        system, _, rest = self.platform.partition("/")
        found = (config.get("os", system), config.get("architecture", rest.partition("/")[0]))
        if found != (system, rest.partition("/")[0]):
            raise not_for(self.platform, ["/".join(map(str, found))])

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


def _link_or_copy(source: Path, target: Path) -> None:
    """`source` under a second name."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
