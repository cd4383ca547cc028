"""Downloads: the blobs of one image into the store, several at once, each checked before it has its name."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from hpc_workspace import claims, files
from hpc_workspace.errors import ImageError
from hpc_workspace.images.progress import Step, Tell
from hpc_workspace.images.reference import Reference
from hpc_workspace.images.registry import Descriptor, Registry, TransferCutError
from hpc_workspace.images.store import Store, sha256_of

log = logging.getLogger(__name__)

_WAIT_TIMEOUT_S = 12 * 3600.0
_CUTS_WITHOUT_PROGRESS = 5


class Meter:
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


class Download:
    """Blobs of one image, from one registry into the store."""

    def __init__(self, store: Store, registry: Registry, reference: Reference, meter: Meter) -> None:
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
