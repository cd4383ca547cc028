"""Registries: manifests and blobs over HTTP, with a login where one is wanted and patience where one is asked for.

Speaks httpx. Every answer's content is checked against the digest that it was asked by, or that is then its name.

Sources: OCI distribution specification 1.1; OCI image specification 1.1; Docker's token authentication
(distribution/docs/spec/auth); Docker Hub's rate limit headers (docs.docker.com/docker-hub/usage/pulls).
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import hashlib
import json
import random
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from hpc_workspace import clock
from hpc_workspace.errors import ImageError
from hpc_workspace.images.credentials import Credentials, Search
from hpc_workspace.images.reference import DIGEST, DOCKER_HUB, Reference
from hpc_workspace.version import __version__

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
SIF_LAYER = "application/vnd.sylabs.sif.layer.v1.sif"
_ACCEPT = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX))

_LARGEST_SIZE = 2**63
_LARGEST_MANIFEST_BYTES = 4 * 1024 * 1024  # the distribution specification's own bound
_CONNECT_TIMEOUT_S = 15.0
_READ_TIMEOUT_S = 30.0
_TRIES = 6
_TRIES_TO_CONNECT = 2
_TRIES_OF_A_MANIFEST = 3
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
# Who is asked to wait longer than this is told so instead.
_LONGEST_RETRY_AFTER_S = 300.0
_NEVER_PASS = (httpx.TooManyRedirects, httpx.UnsupportedProtocol)
_TOO_MANY = 429
_PARTIAL = 206


@dataclass(frozen=True)
class Descriptor:
    """A blob or manifest: what it is, its name, its size. OCI image specification, descriptor.md."""

    media_type: str
    digest: str
    size_bytes: int

    @classmethod
    def parse(cls, value: Any, where: str) -> Descriptor:
        """Raises: ImageError: it is none, or not by SHA-256."""
        if not isinstance(value, dict):
            raise ImageError(f"{where} has no valid descriptor.")
        media_type, digest, size = (value.get(key) for key in ("mediaType", "digest", "size"))
        if not isinstance(media_type, str) or type(size) is not int or not 0 <= size < _LARGEST_SIZE:
            raise ImageError(f"{where} has no valid descriptor.")
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise ImageError(f"{where} names a blob by something else than sha256: {str(digest)[:20]!r}.")
        return cls(media_type, digest, size)


@dataclass(frozen=True)
class RateLimit:
    """How many manifests may be fetched in how long; `remaining` is None where the registry does not say."""

    pulls: int
    window_s: float
    remaining: int | None


class Registry:
    """One registry, from here. Safe to use from several threads; close it at the end.

    Args:
        host: with its port if it has one.
        plain_http: whether it is spoken to without TLS.
        find_credentials: asked with a repository's name when the registry wants a login.
        on_wait: told in words why a request is made again, and when.
    """

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool,
        find_credentials: Callable[[str], Search],
        on_wait: Callable[[str], None],
    ) -> None:
        self.host = host
        self.rate_limit: RateLimit | None = None
        self._plain_http = plain_http
        self._find_credentials = find_credentials
        self._on_wait = on_wait
        self._authorizations: dict[str, str] = {}
        self._lock = threading.Lock()
        address = "registry-1.docker.io" if host == DOCKER_HUB else host
        try:
            self._http = httpx.Client(
                base_url=f"{'http' if plain_http else 'https'}://{address}",
                headers={"User-Agent": f"hpc-workspace/{__version__}"},
                timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
                # Of another origin than the registry's, httpx drops our Authorization.
                follow_redirects=True,
                event_hooks={"request": [self._require_tls]},
            )
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:  # SOCKS, for one, needs more than httpx
            raise ImageError(
                f"{host} can't be reached: the environment names a proxy or certificates that can't be used.",
                evidence=_without_password(str(error)),
                remedy="HTTPS_PROXY is http://HOST:PORT, NO_PROXY the hosts to reach without; SSL_CERT_FILE is a file.",
            ) from error

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def digest_of(self, reference: Reference) -> str | None:
        """The digest that the registry has now for a tag; None if it does not say without sending the manifest.

        Docker Hub does not count this as a pull.

        Raises: as `manifest`.
        """
        if reference.digest:
            return reference.digest
        with self._send("HEAD", reference, f"manifests/{reference.version}", {"Accept": _ACCEPT}) as answer:
            digest = answer.headers.get("Docker-Content-Digest", "")
        return digest if DIGEST.fullmatch(digest) else None

    def manifest(self, reference: Reference, version: str) -> tuple[bytes, str, str]:
        """The manifest or index called `version` (a tag or digest): its bytes, media type and digest.

        Raises:
            ImageError: there is none, a login is wanted, the registry can't be reached or keeps failing, or what came
                is not what was asked for.
        """
        for tries_left in reversed(range(_TRIES_OF_A_MANIFEST)):
            try:
                body, media_type = self._whole_manifest(reference, version)
                break
            except httpx.HTTPError as error:  # in the middle of it: what comes before is `_send`'s matter
                if not tries_left:
                    raise ImageError(
                        f"{self.host} cut the connection in the middle of a manifest, again and again.",
                        evidence=_said(error),
                        remedy="Try again later.",
                    ) from error
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if DIGEST.fullmatch(version) and digest != version:
            raise ImageError(f"{self.host} sent another manifest of {reference} than {version}.", evidence=digest)
        return body, media_type, digest

    def _whole_manifest(self, reference: Reference, version: str) -> tuple[bytes, str]:
        """Its bytes and media type. Raises: httpx.HTTPError: the connection broke; ImageError: as `manifest`."""
        with self._send("GET", reference, f"manifests/{version}", {"Accept": _ACCEPT}) as answer:
            body = bytearray()
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > _LARGEST_MANIFEST_BYTES:
                    raise ImageError(f"The manifest of {reference} is larger than 4 MiB.")
            return bytes(body), answer.headers.get("Content-Type", "").partition(";")[0].strip()

    @contextlib.contextmanager
    def blob(self, reference: Reference, digest: str, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Yields where the bytes start that come (`offset`, or 0 if the registry can't begin there), and the bytes.

        Raises: as `manifest`, before anything comes.
            TransferCutError: from the iterator, when the connection broke.
        """
        # A Content-Encoding on top would be none of the blob's.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        with self._send("GET", reference, f"blobs/{digest}", headers) as answer:
            yield offset if answer.status_code == _PARTIAL else 0, self._read_on(answer)

    def _read_on(self, answer: httpx.Response) -> Iterator[bytes]:
        try:
            # Raw: a Content-Encoding on top would be none of the blob's. As it comes: asked for chunks of a size, httpx
            # keeps back what it has of one, and loses it when the connection breaks.
            yield from answer.iter_raw()
        except httpx.TransportError as error:
            raise TransferCutError(_said(error)) from error

    @contextlib.contextmanager
    def _send(
        self, method: str, reference: Reference, path: str, headers: Mapping[str, str]
    ) -> Iterator[httpx.Response]:
        """An answer of 2xx, tried again where that may help. Raises: ImageError: there is none."""
        url = f"/v2/{reference.repository}/{path}"
        pauses = clock.pauses_s(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, 2.0)
        logged_in = False
        failures = 0
        while True:
            authorization = self._authorizations.get(reference.repository)
            sent = dict(headers) | ({"Authorization": authorization} if authorization else {})
            with contextlib.ExitStack() as stack:
                try:
                    answer = stack.enter_context(self._http.stream(method, url, headers=sent))
                    if answer.status_code == httpx.codes.UNAUTHORIZED and not logged_in and self._is_own(answer):
                        refusal = self._log_in(reference, answer)
                        if refusal is None:
                            logged_in = True
                            continue
                        answer = refusal
                except httpx.HTTPError as error:
                    failures += 1
                    tries = _TRIES_TO_CONNECT if isinstance(error, httpx.ConnectError) else _TRIES
                    if failures >= tries or _is_no_tls(error) or isinstance(error, _NEVER_PASS):
                        raise self._unreachable(error) from error
                    reason, pause_s = _said(error), next(pauses)
                else:
                    self._note_rate_limit(answer)
                    if answer.is_success:
                        yield answer
                        return
                    failures += 1
                    if not _may_pass(answer.status_code) or failures >= _TRIES:
                        raise self._refused(reference, answer)
                    pause_s = next(pauses) if (told := _retry_after_s(answer)) is None else told
                    if pause_s > _LONGEST_RETRY_AFTER_S:
                        raise self._refused(reference, answer)
                    reason = f"HTTP {answer.status_code}"
            pause_s += random.uniform(0, 0.1) * pause_s  # noqa: S311 - so that many who were told the same don't come at once
            self._on_wait(f"{self.host}: {reason}; trying again in {pause_s:.0f} s")
            clock.sleep(pause_s)

    def _is_own(self, answer: httpx.Response) -> bool:
        """Whether it is the registry's own, and not of a host that it sent us on to: that one gets no login."""
        return answer.url.netloc == self._http.base_url.netloc

    def _log_in(self, reference: Reference, answer: httpx.Response) -> httpx.Response | None:
        """Get what opens `reference`'s repository, as the answer's challenge says.

        Returns: None; or how the one who gives it refused, where that may pass.

        Raises:
            ImageError: nothing opens it.
            httpx.HTTPError: the one who gives it can't be reached.
        """
        challenges = [_parse_challenge(text) for text in answer.headers.get_list("WWW-Authenticate")]
        search = self._find_credentials(reference.repository)
        for scheme, parameters in challenges:
            if scheme == "basic" and search.credentials is not None and not search.credentials.is_token:
                authorization = _basic_header(search.credentials)
                break
            if scheme == "bearer" and "realm" in parameters:
                token = self._fetch_token(reference, parameters, search)
                if not isinstance(token, str):
                    return token
                authorization = f"Bearer {token}"
                break
        else:
            raise self._refused(reference, answer, search)
        with self._lock:
            self._authorizations[reference.repository] = authorization
        return None

    def _fetch_token(self, reference: Reference, challenge: Mapping[str, str], search: Search) -> str | httpx.Response:
        """A token, or a refusal that may pass. Raises: as `_log_in`."""
        try:
            realm = httpx.URL(challenge["realm"])
        except httpx.InvalidURL:
            realm = httpx.URL()
        if not realm.host:
            raise ImageError(f"{self.host} wants a login at a place that is no URL.")
        if realm.scheme != "https" and not (self._plain_http and realm.scheme == "http"):
            raise ImageError(
                f"{self.host} wants a login at {realm.scheme}://{realm.host}, which is not TLS.",
                remedy="Nothing was sent there. If that is right, add the registry to images.plain_http.",
            )
        asked = {"service": challenge.get("service", ""), "scope": f"repository:{reference.repository}:pull"}
        credentials = search.credentials
        if credentials is not None and credentials.is_token:
            form = {
                **asked,
                "grant_type": "refresh_token",
                "refresh_token": credentials.secret,
                "client_id": "hpc-workspace",
            }
            answer = self._http.post(realm, data=form, follow_redirects=False)
        else:
            auth = _basic(credentials)
            answer = self._http.get(realm, params=asked, auth=auth, follow_redirects=False)
        if _may_pass(answer.status_code):
            return answer
        if not answer.is_success:
            raise self._refused(reference, answer, search)
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            found = answer.json()
            token = found.get("token") or found.get("access_token")
            if isinstance(token, str) and token.isprintable() and token:
                return token
        raise ImageError(f"{realm.host} gave no token for {reference}.", evidence=f"HTTP {answer.status_code}")

    def _require_tls(self, request: httpx.Request) -> None:
        """Raises: ImageError: the registry sends us on to a place without TLS."""
        if request.url.scheme != "https" and not self._plain_http:
            raise ImageError(f"{self.host} redirects to {request.url.scheme}://{request.url.host}, which is not TLS.")

    def _note_rate_limit(self, answer: httpx.Response) -> None:
        limit = re.match(r"(\d+);w=(\d+)", answer.headers.get("ratelimit-limit", ""))
        if limit:
            said = re.match(r"\d+", answer.headers.get("ratelimit-remaining", ""))
            remaining = int(said[0]) if said else None
            with self._lock:
                known = self.rate_limit.remaining if self.rate_limit else None
                if remaining is not None and known is not None:  # answers come in any order
                    remaining = min(remaining, known)
                self.rate_limit = RateLimit(int(limit[1]), float(limit[2]), remaining)

    def _refused(self, reference: Reference, answer: httpx.Response, search: Search | None = None) -> ImageError:
        status = answer.status_code
        said = f"HTTP {status}{_said_in(answer)}"
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            search = search or self._find_credentials(reference.repository)
            used = search.credentials.found_in if search.credentials else ""
            places = ", ".join(search.looked_in) or "no file or variable with credentials"
            return ImageError(
                f"{self.host} does not let us read {reference.repository}: "
                + (
                    f"the login of {used} is not enough."
                    if used
                    else "it wants a login, or there is no such repository."
                ),
                evidence=f"{said}. Looked for a login in: {places}.",
                remedy=f"apptainer registry login docker://{self.host} (or docker login), or set "
                "APPTAINER_DOCKER_USERNAME and APPTAINER_DOCKER_PASSWORD.",
            )
        if status == httpx.codes.NOT_FOUND:
            return ImageError(
                f"{self.host} has no {reference.repository}{reference.shown_version}.",
                evidence=said,
                remedy="Check the name and the tag.",
            )
        if status == _TOO_MANY:
            told = _retry_after_s(answer)
            return ImageError(
                f"{self.host} has had too many requests from here.",
                evidence=said + (f"; it asks to wait {told:.0f} s" if told is not None else ""),
                remedy="Log in (the limit is higher then), wait, or use a mirror; `hpc-workspace images plan` says how "
                "long many images take.",
            )
        return ImageError(f"{self.host} failed.", evidence=said, remedy="Try again later.")

    def _unreachable(self, error: httpx.HTTPError) -> ImageError:
        proxies = urllib.request.getproxies()
        proxy = _without_password(proxies.get("https") or proxies.get("http") or "")
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            remedy = (
                "Its certificate is not trusted here: SSL_CERT_FILE names the file of the authority that signed it."
            )
        elif _is_no_tls(error):
            remedy = (
                f"If it is meant to be without TLS, add {self.host} to images.plain_http "
                f"(HPC_WORKSPACE_IMAGES_PLAIN_HTTP={self.host})."
            )
        else:
            remedy = "Is there a network from here? images.fetch_on names a partition that has one, HTTPS_PROXY a proxy"
            remedy += f" (now {proxy})." if proxy else "."
        return ImageError(f"{self.host} can't be reached.", evidence=_said(error), remedy=remedy)


class TransferCutError(Exception):
    """The connection broke in the middle of a blob. What came before is good, as far as it goes."""


def _basic(credentials: Credentials | None) -> httpx.BasicAuth | None:
    return httpx.BasicAuth(credentials.user, credentials.secret) if credentials is not None else None


def _basic_header(credentials: Credentials) -> str:
    pair = f"{credentials.user}:{credentials.secret}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _parse_challenge(text: str) -> tuple[str, dict[str, str]]:
    """Scheme in small letters and parameters of a WWW-Authenticate header; RFC 9110, 11.6.1, one challenge a header."""
    scheme, _, rest = text.strip().partition(" ")
    pairs = re.findall(r'\b([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))', rest)
    return scheme.lower(), {name.lower(): quoted or bare for name, quoted, bare in pairs}


def _may_pass(status: int) -> bool:
    return status in (_TOO_MANY, httpx.codes.REQUEST_TIMEOUT) or status >= httpx.codes.INTERNAL_SERVER_ERROR


def _retry_after_s(answer: httpx.Response) -> float | None:
    """Seconds that the registry asks us to wait; None if it does not say. RFC 9110, 10.2.3."""
    said = answer.headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        until = email.utils.parsedate_to_datetime(said)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
    return max(0.0, (until - datetime.datetime.now(tz=datetime.UTC)).total_seconds())


def _said(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _said_in(answer: httpx.Response) -> str:
    """The first message of a registry's JSON errors, shortened and without control characters; else empty."""
    try:
        with contextlib.closing(answer):
            body = bytearray()
            for chunk in answer.iter_bytes(4096):
                body += chunk
                if len(body) >= 16 * 1024:
                    break
        first = json.loads(body)["errors"][0]
        text = f"{first.get('code', '')} {first.get('message', '')}".strip()
    except (
        ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, httpx.HTTPError, httpx.StreamError,
    ):  # fmt: skip
        return ""
    return ": " + "".join(c for c in text if c.isprintable())[:300]


def _is_no_tls(error: httpx.HTTPError) -> bool:
    """Whether the other side does not speak TLS, or its certificate is not trusted: no second try helps."""
    return isinstance(error, httpx.ConnectError) and "SSL" in str(error)


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)
