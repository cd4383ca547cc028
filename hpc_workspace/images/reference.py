"""References: names of images that are somewhere else, in the one form in which two names of one image are equal.

Source: the grammar of distribution/reference (Docker), and apptainer-pull(1) 1.4.5 for the schemes.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from hpc_workspace.errors import ConfigError
from hpc_workspace.text import no_control

# Where the registry is spoken to by ourselves, and what lies in a file or directory of this machine.
REGISTRY_SCHEMES = ("docker", "oras")
LOCAL_SCHEMES = ("docker-archive", "oci-archive", "oci")
# What Apptainer alone knows how to fetch.
OTHER_SCHEMES = ("library", "http", "https")
DOCKER_HUB = "docker.io"

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(//)?(.*)")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[([0-9a-fA-F:]+)\])(?::([0-9]{{1,5}}))?")
_LARGEST_PORT = 65535
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Reference:
    """An image somewhere else.

    Attributes:
        scheme: how it is got, such as docker, oras or docker-archive.
        registry: host, with its port if it has one; empty where there is no registry.
        repository: its name in the registry; elsewhere all that follows the scheme.
        tag: empty only beside a digest, or where there is no registry.
        digest: `sha256:…` if the name has one, else empty. It says which image it is; a tag beside it does not count.
    """

    scheme: str
    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        if not self.registry:
            return f"{self.scheme}:{'//' if self.scheme in OTHER_SCHEMES else ''}{self.repository}"
        return f"{self.scheme}://{self.registry}/{self.repository}{self.shown_version}"

    @property
    def shown_version(self) -> str:
        """The end of its name: `:tag` or `@digest`."""
        return f"@{self.digest}" if self.digest else f":{self.tag}"

    @property
    def version(self) -> str:
        """What a registry is asked for: the digest, else the tag."""
        return self.digest or self.tag

    @property
    def is_of_registry(self) -> bool:
        return self.scheme in REGISTRY_SCHEMES

    @property
    def is_local(self) -> bool:
        return self.scheme in LOCAL_SCHEMES


def parse_image(image: str) -> Reference | Path:
    """What `image` names: a SIF file or sandbox directory of this machine, or something to be fetched.

    A bare name is Docker's, unless it looks like a path, or a SIF file or sandbox of this name is here.

    Raises:
        ConfigError: it is neither.
    """
    try:
        no_control(image).encode()  # what is not UTF-8 can't be written down
    except UnicodeEncodeError as error:
        raise _malformed(image, "it is not UTF-8") from error
    except ValueError as error:
        raise _malformed(image, f"it {error}") from error
    found = _SCHEME.fullmatch(image)
    if found and (found[2] or found[1] in LOCAL_SCHEMES):
        return _parse_schemed(image, found[1], found[3])
    if image.endswith(".sif") or image.startswith(("/", "./", "../", "~")) or _is_image_here(Path(image)):
        return _absolute(image, image)
    return parse_registry_name("docker", image)


def _absolute(path: str, image: str) -> Path:
    """Raises: ConfigError: it begins with ~ and the name of nobody."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise _malformed(image, "there is no such home directory") from error


def _is_image_here(path: Path) -> bool:
    try:
        return path.is_file() or (path / ".singularity.d").is_dir()
    except OSError:  # too long a name, or a directory that is shut to us
        return False


def _parse_schemed(image: str, scheme: str, rest: str) -> Reference:
    if scheme in REGISTRY_SCHEMES:
        return parse_registry_name(scheme, rest)
    if not rest:
        raise _malformed(image, "nothing follows the scheme")
    if scheme in LOCAL_SCHEMES:
        return Reference(scheme, "", f"/{str(_absolute(rest, image)).lstrip('/')}")
    if scheme in OTHER_SCHEMES:
        return Reference(scheme, "", rest)
    known = ", ".join((*REGISTRY_SCHEMES, *LOCAL_SCHEMES, *OTHER_SCHEMES))
    raise _malformed(image, f"there is no scheme {scheme!r} (there are {known})")


def parse_registry_name(scheme: str, name: str) -> Reference:
    """`[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]` as a reference; without a host, Docker Hub's.

    Raises:
        ConfigError: it is none.
    """
    rest, at, digest = name.partition("@")
    if at and not DIGEST.fullmatch(digest):
        raise _malformed(name, "what follows the @ is not sha256: and 64 hexadecimal digits")
    head, slash, tail = rest.partition("/")
    if slash and ("." in head or ":" in head or head == "localhost" or head.startswith("[")):
        registry, rest = head.lower(), tail
    elif scheme == "docker":
        registry = DOCKER_HUB
    else:
        raise _malformed(name, "it names no registry")
    if not _is_host(registry):
        raise _malformed(name, f"{registry} is not a host")
    repository, colon, tag = rest.partition(":")
    if registry in (DOCKER_HUB, "index.docker.io", "registry-1.docker.io"):
        registry = DOCKER_HUB
        repository = repository if "/" in repository else f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository):
        why = "it has capital letters" if repository != repository.lower() else "that is no repository"
        raise _malformed(name, why)
    if colon and not _TAG.fullmatch(tag):
        raise _malformed(name, f"{tag!r} is not a tag")
    return Reference(scheme, registry, repository, "" if digest else tag or "latest", digest)


def _is_host(text: str) -> bool:
    found = _HOST.fullmatch(text)
    if found is None or int(found[2] or 0) > _LARGEST_PORT:
        return False
    try:
        return found[1] is None or bool(socket.inet_pton(socket.AF_INET6, found[1]))
    except OSError:
        return False


def _malformed(image: str, why: str) -> ConfigError:
    return ConfigError(
        f"{_shown(image)!r} is not an image: {_shown(why)}.",
        option="image",
        remedy="Write docker://HOST/REPOSITORY:TAG, oras://…, docker-archive:FILE, or the path of a .sif file.",
    )


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_SHOWN_CHARACTERS])
