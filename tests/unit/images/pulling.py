"""What the tests of images share: SIF files, fetches into one store, other processes that fetch, executables on PATH."""

from __future__ import annotations

import datetime
import functools
import ipaddress
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hpc_workspace.config import ImageSettings
from hpc_workspace.images.fetch import Fetcher
from hpc_workspace.images.manifest import Source
from hpc_workspace.images.progress import Step
from hpc_workspace.images.reference import Reference, parse_image
from hpc_workspace.images.store import Store
from hpc_workspace.options import PullPolicy
from tests.registry import Registry

MIB = 1024 * 1024
_Value = TypeVar("_Value")


def sif(payload: bytes = b"") -> bytes:
    """The bytes of a file that is taken for a SIF."""
    return bytes(32) + b"SIF_MAGIC" + payload


@functools.cache
def big(size_bytes: int, seed: int = 0) -> bytes:
    """A SIF of just this size, in which no two parts are alike."""
    payload = b"".join(i.to_bytes(8, "big") for i in range(seed << 32, (seed << 32) + size_bytes // 8 + 1))
    return sif(payload)[:size_bytes]


def oras(r: Registry, name: str = "team/app", tag: str = "1") -> str:
    return f"oras://{r.host}/{name}:{tag}"


def named(image: str) -> Reference:
    found = parse_image(image)
    assert isinstance(found, Reference)
    return found


class Puller:
    """Fetches of one client: a fetcher of its own, and all that it told."""

    def __init__(
        self,
        root: Path,
        *registries: Registry,
        platform: str = "linux/amd64",
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self.steps: list[Step] = []
        self.store = Store(root)
        settings = ImageSettings(plain_http=[r.host for r in registries])

        def tell(step: Step) -> None:
            self.steps.append(step)
            on_step(step)

        self.fetcher = Fetcher(self.store, settings, runtime="auto", platform=platform, tell=tell)

    def fetch(self, image: str, policy: PullPolicy = "missing") -> Path:
        return self.fetcher.fetch(named(image), policy)

    def resolve(self, image: str) -> Source:
        """What the image is, without fetching it."""
        reference = named(image)
        self.store.prepare()
        with self.fetcher.open_registry(reference.registry, reference) as registry:
            return self.fetcher.resolve(registry, reference)

    @property
    def told(self) -> list[str]:
        return [step.text for step in self.steps]

    @property
    def is_waiting(self) -> bool:
        return any(text.startswith("waiting for") for text in self.told)

    def part(self) -> Path:
        """The one blob that is half here."""
        (part,) = self.store.layers.glob("*.part")
        return part


class at_once(list[_Value | BaseException]):
    """Each call in a thread of its own, all let go at one moment; after `join` what each returned or raised."""

    def __init__(self, calls: list[Callable[[], _Value]]) -> None:
        super().__init__()
        self._results: dict[int, _Value | BaseException] = {}
        barrier = threading.Barrier(len(calls))

        def run(index: int, call: Callable[[], _Value]) -> None:
            barrier.wait()
            try:
                self._results[index] = call()
            except BaseException as error:  # noqa: BLE001 - it is the result
                self._results[index] = error

        self._threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(calls)]
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float = 30) -> at_once[_Value]:
        for thread in self._threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), "a call did not end"
        self[:] = [self._results[index] for index in sorted(self._results)]
        return self


FETCHING = """
import sys, threading
from pathlib import Path
from hpc_workspace.config import ImageSettings
from hpc_workspace.images.fetch import Fetcher
from hpc_workspace.images.reference import parse_image
from hpc_workspace.images.store import Store

root, host, count, *images = sys.argv[1:]
settings = ImageSettings(plain_http=[host])
paths = []

def fetch(image):
    fetcher = Fetcher(Store(Path(root)), settings, runtime="auto", platform="linux/amd64", tell=lambda step: None)
    paths.append(str(fetcher.fetch(parse_image(image), "missing")))

threads = [threading.Thread(target=fetch, args=(image,)) for image in images for _ in range(int(count))]
print("ready", flush=True)
sys.stdin.readline()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*sorted(paths), flush=True)
"""


class FetchingProcess:
    """Another process that fetches `images` in `threads` threads each, once `go` is said."""

    def __init__(self, root: Path, r: Registry, *images: str, threads: int = 1) -> None:
        argv = [sys.executable, "-c", FETCHING, str(root), r.host, str(threads), *images]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(self) -> None:
        assert self.process.stdin and self.process.stdout
        assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def paths(self) -> list[str]:
        """What it fetched, after its end."""
        output, _ = self.process.communicate(timeout=30)
        return output.split()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def everything(value: Any) -> str:
    """All that a person may get to see of an error or an object."""
    return "\n".join([str(value), repr(value), repr(getattr(value, "__dict__", ""))])


def make_certificate(path: Path) -> Path:
    """A file with a new key and its certificate for 127.0.0.1, which is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a registry for tests")])
    now = datetime.datetime.now(tz=datetime.UTC)
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(addresses, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password) + certificate.public_bytes(pem)
    )
    return path
