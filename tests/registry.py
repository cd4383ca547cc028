"""A small OCI registry for tests: real HTTP, the pull half of the distribution spec 1.1, and faults on demand.

In a unit test:

    with Registry(login=("ada", "pw")) as r:
        digest = r.push("team/app", "latest", files={"hello": b"hi"})
        r.faults.append(Fault("cut", match="GET /v2/team/app/blobs/", times=1, after_bytes=100))
        ...  # a client pulls r.host + "/team/app"
        assert [q.status for q in r.seen("/blobs/")] == [401, 200, 206]

On a node of the test cluster, laid over its real registry (standard library only, Python >= 3.11):

    python3 registry.py --port 0 --state DIR --upstream http://login:5000    # prints: LISTENING <port>
    curl -d '{"kind": "status", "status": 429, "headers": {"Retry-After": "1"}, "times": 2}' HOST:PORT/faults
    curl -X DELETE HOST:PORT/faults; curl HOST:PORT/requests

It is not a registry to push to over HTTP, speaks no TLS, keeps what it holds in memory, never forgets a pull of the
rate limit's window, and serves every blob under every name. The pages /faults and /requests are open to anyone who can
reach the port, and neither recorded nor spoiled.

Source: github.com/opencontainers/distribution-spec v1.1 (end-1 to end-3, end-8a, error codes), image-spec v1.1;
distribution.github.io/distribution/spec/auth/{token,oauth}; docs.docker.com/docker-hub/usage (the rate limit's headers).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import platform as machine
import re
import secrets
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from email.message import Message
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tarfile import TarFile, TarInfo
from typing import IO, Any, Literal
from urllib.parse import parse_qs, urlsplit

Kind = Literal["status", "cut", "stall", "corrupt", "wrong_digest"]
KINDS: tuple[Kind, ...] = ("status", "cut", "stall", "corrupt", "wrong_digest")
Media = Literal["oci", "docker"]
MEDIA = {  # of a manifest, an index, a config, a layer: what comes after application/vnd.
    "oci": "oci.image.manifest.v1+json oci.image.index.v1+json oci.image.config.v1+json oci.image.layer.v1.tar+gzip",
    "docker": "docker.distribution.manifest.v2+json docker.distribution.manifest.list.v2+json"
    " docker.container.image.v1+json docker.image.rootfs.diff.tar.gzip",
}
CODES = {401: "UNAUTHORIZED", 403: "DENIED", 404: "NAME_UNKNOWN", 405: "UNSUPPORTED", 429: "TOOMANYREQUESTS"}
PATH_ENV = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)
OF_THE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "date", "server", "content-length"}
CHUNK_BYTES = 65536


@dataclass(eq=False)
class Fault:
    """What goes wrong with requests whose "METHOD path?query" contains `match`; the first that fits is the only one.

    Args:
        kind: `status`: answered with `status`, `headers` and `body` before anything else is looked at, the login
            included. The others spoil a real answer (2xx) and let every other pass uncounted. `cut`: the full
            Content-Length, `after_bytes` of the body, then the end of the connection. `stall`: the same, but silence
            until the client goes (or the registry closes); removed from `faults`, the rest is sent. `corrupt`: the byte
            at `after_bytes` (0: the middle one) is flipped. `wrong_digest`: Docker-Content-Digest names another.
        times: how many requests it is for; None: all. A spent fault stays in the list.
        after_bytes: of this answer's body, whatever its range. A cut or stall beyond its end isn't applied or counted.
            -1: not even the status line, and for any answer.
        reset: the cut is a TCP reset, which may take bytes under way along; otherwise an orderly end after the last.
        body: instead of the JSON error, sent as text/html: the page of a gateway or captive portal.
        hits: how many requests it was applied to.
    """

    kind: Kind
    match: str = ""
    times: int | None = None
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int = 0
    reset: bool = False
    body: str = ""
    hits: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such fault: {self.kind!r}; there are {', '.join(KINDS)}")

    @property
    def breaks(self) -> bool:
        return self.kind in ("cut", "stall")

    def spoils(self, answer: Answer, body_bytes: int) -> bool:
        """Whether it has something to do with this answer, of which so many bytes of a body are to be sent."""
        if self.breaks and self.after_bytes < 0:
            return True
        if self.kind == "status" or answer.status >= 300:
            return False
        if self.kind == "wrong_digest":
            return "Docker-Content-Digest" in answer.headers
        return max(0, self.after_bytes) < body_bytes


@dataclass
class Seen:
    """A request as it was answered. `status` 0: not yet, or never."""

    method: str
    path: str  # with its query
    authorization: str  # the kind alone: "Bearer", "Basic" or ""
    range: str
    user_agent: str
    client: str  # host:port of the other end: the same for requests of one kept connection
    at_s: float  # seconds since the epoch
    status: int = 0
    sent_bytes: int = 0  # of the body
    fault: str = ""  # the kind applied

    @property
    def line(self) -> str:
        """What faults and `Registry.seen` match."""
        return f"{self.method} {self.path}"


@dataclass
class Answer:
    """What goes back; `length` is the Content-Length, of which a HEAD sends nothing."""

    status: int
    headers: dict[str, str]
    body: IO[bytes]
    length: int


def _answer(status: int, data: bytes, media: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"Content-Type": media, **named}, io.BytesIO(data), len(data))


def _json(status: int, value: Any, **headers: str) -> Answer:
    return _answer(status, json.dumps(value).encode(), "application/json", **headers)


def _error(status: int, code: str = "", message: str = "", **headers: str) -> Answer:
    code = code or CODES.get(status, "UNKNOWN")
    return _json(status, {"errors": [{"code": code, "message": message or code.lower(), "detail": {}}]}, **headers)


def _media(media: Media) -> list[str]:
    return ["application/vnd." + name for name in MEDIA[media].split()]


def sha256(data: bytes) -> str:
    """The digest as registries spell it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """The same files always give the same bytes. What starts as a script or an ELF file may be run."""
    buffer = io.BytesIO()
    with TarFile(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            entry = TarInfo(name)
            entry.size, entry.mode = len(data), 0o755 if data.startswith((b"#!", b"\x7fELF")) else 0o644
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def this_platform() -> str:
    """Such as linux/amd64."""
    return "linux/" + {"x86_64": "amd64", "aarch64": "arm64"}.get(machine.machine(), machine.machine())


def _platform(text: str) -> dict[str, str]:
    return dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False))


@dataclass
class Content:
    """What a registry holds; two registries may share one."""

    blobs: dict[str, bytes] = field(default_factory=dict)  # by digest
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    # by name and tag or digest: media type and bytes

    def add_blob(self, data: bytes, media: str, **more: Any) -> dict[str, Any]:
        """Its descriptor."""
        self.blobs[sha256(data)] = data
        return {"mediaType": media, "digest": sha256(data), "size": len(data), **more}

    def add_manifest(self, name: str, tag: str, manifest: Mapping[str, Any]) -> str:
        """Its digest; the tag, where there is one, moves to it."""
        data = json.dumps({"schemaVersion": 2, **manifest}, indent=2).encode()
        for reference in filter(None, (tag, sha256(data))):
            self.manifests[name, reference] = (manifest["mediaType"], data)
        return sha256(data)


@dataclass(kw_only=True, eq=False)
class Registry(contextlib.AbstractContextManager["Registry"]):
    """Listens from the moment it is made until `close` (or the end of its `with`). Every setting may change meanwhile.

    Args:
        port: 0: a free one, which `port` then says.
        content: what it holds; another registry's `content` makes two hosts of the same images.
        upstream: URL of a plain HTTP registry that GET and HEAD of /v2/ are passed to; `content` isn't looked at.
        login: user and secret; with `scheme` "basic" asked for at every request, with "bearer" at /token alone.
        anonymous: /token gives a token to anyone who names nobody.
        token_s: how long a token is good for. `tokens.clear()` ends all that were given.
        identity_token: what POST /token takes as a refresh token.
        blobs_at: URL of another registry that GETs of blobs are sent to with 307. Skopeo 1.18 sends Authorization along
            to another port of the same host, Apptainer 1.4 doesn't: for two hosts let the other's `address` be
            127.0.0.2 (Linux).
        ranges: False: Range is ignored, as some registries and proxies do.
        rate_limit: GETs of manifests, and the window in seconds that is announced. Beyond it they are answered 429.
        log: a file that each request is appended to, a JSON object a line, as its answer begins (`sent_bytes` is 0).
    """

    address: str = "127.0.0.1"
    port: int = 0
    content: Content = field(default_factory=Content, repr=False)
    upstream: str = ""
    login: tuple[str, str] | None = field(default=None, repr=False)
    scheme: Literal["bearer", "basic"] = "bearer"
    anonymous: bool = False
    token_s: float = 300
    identity_token: str = field(default="identity-token-for-tests", repr=False)
    blobs_at: str = ""
    ranges: bool = True
    rate_limit: tuple[int, int] | None = None
    log: Path | None = None
    faults: list[Fault] = field(default_factory=list)
    requests: list[Seen] = field(default_factory=list, repr=False)
    tokens: dict[str, tuple[set[str], float]] = field(default_factory=dict, repr=False)  # names it may pull, its end
    manifest_gets: int = 0

    def __post_init__(self) -> None:
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._server = _Server((self.address, self.port), self)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def host(self) -> str:
        """host:port, as in a reference."""
        return f"{'127.0.0.1' if self.address == '0.0.0.0' else self.address}:{self.port}"  # noqa: S104 - compared

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def close(self) -> None:
        """Nothing listens, and kept connections are cut."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def seen(self, match: str = "") -> list[Seen]:
        """The requests so far whose "METHOD path?query" contains `match`."""
        return [seen for seen in list(self.requests) if match in seen.line]

    # --- what it holds ---

    def push(
        self,
        name: str,
        tag: str = "latest",
        *,
        files: Mapping[str, bytes] | None = None,
        layers: Sequence[Mapping[str, bytes]] = (),
        media: Media = "oci",
        platform: str = "",
        platforms: Sequence[str] = (),
        env: Sequence[str] = PATH_ENV,
        entrypoint: Sequence[str] = (),
    ) -> str:
        """The digest that the tag now names: of a manifest, or with `platforms` of an index over one for each.

        Args:
            tag: "" leaves the image without one.
            files: the first layer, by path; `layers` are put on top of it. `.wh.NAME` takes NAME away.
            platform: such as linux/arm64/v8; "": this machine's.
        """
        if platforms:
            more: dict[str, Any] = {"files": files, "layers": layers, "media": media, "env": env}
            each = {p: self.push(name, "", platform=p, entrypoint=entrypoint, **more) for p in platforms}
            held = {p: (digest, *self.content.manifests[name, digest]) for p, digest in each.items()}
            entries = [
                {"mediaType": kind, "digest": digest, "size": len(data), "platform": _platform(p)}
                for p, (digest, kind, data) in held.items()
            ]
            return self.content.add_manifest(name, tag, {"mediaType": _media(media)[1], "manifests": entries})
        manifest_media, _, config_media, layer_media = _media(media)
        tars = [tar_of(layer) for layer in ([files] if files is not None else []) + list(layers)]
        config: dict[str, Any] = {
            **_platform(platform or this_platform()),
            "created": "2024-01-01T00:00:00Z",
            "config": {"Env": list(env), **({"Entrypoint": list(entrypoint)} if entrypoint else {})},
            "rootfs": {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]},
            "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "tests/registry.py"} for _ in tars],
        }
        manifest = {
            "mediaType": manifest_media,
            "config": self.content.add_blob(json.dumps(config).encode(), config_media),
            "layers": [self.content.add_blob(gzip.compress(tar, mtime=0), layer_media) for tar in tars],
        }
        return self.content.add_manifest(name, tag, manifest)

    def push_oras(self, name: str, tag: str, sif_bytes: bytes) -> str:
        """The digest of a manifest whose one layer is a SIF file, as `apptainer push oras://` makes it."""
        title = {"org.opencontainers.image.title": f"{name.rpartition('/')[2]}.sif"}
        manifest = {
            "mediaType": _media("oci")[0],
            "config": self.content.add_blob(b"{}", "application/vnd.sylabs.sif.config.v1+json"),
            "layers": [self.content.add_blob(sif_bytes, "application/vnd.sylabs.sif.layer.v1.sif", annotations=title)],
        }
        return self.content.add_manifest(name, tag, manifest)

    def manifest(self, name: str, reference: str = "latest") -> dict[str, Any]:
        """What is stored under a tag or digest; KeyError where nothing is."""
        parsed: dict[str, Any] = json.loads(self.content.manifests[name, reference][1])
        return parsed

    def platforms(self, name: str, reference: str = "latest") -> dict[str, str]:
        """The manifest digests of an index, by platform."""
        entries = self.manifest(name, reference)["manifests"]
        return {"/".join(entry["platform"].values()): entry["digest"] for entry in entries}

    # --- what it answers ---

    def answer(self, seen: Seen, headers: Message, body: bytes) -> Answer:
        """What goes back, before any but a `status` fault."""
        if fault := self.take(seen):
            error = _error(fault.status, message="a fault of the test")
            answer = _answer(fault.status, fault.body.encode(), "text/html") if fault.body else error
            answer.headers.update(fault.headers)
            return answer
        url = urlsplit(seen.path)
        if url.path == "/token":
            return self._token(seen, headers, parse_qs(url.query if seen.method == "GET" else body.decode()))
        found = re.fullmatch(r"/v2/(?:(.+)/(manifests|blobs|tags)/([^/]+))?", url.path)
        if not found:
            return _error(404)
        name, kind, _ = found.groups()
        if refused := self._refuse(headers, name):
            return refused
        if seen.method not in ("GET", "HEAD"):
            return _error(405)
        if kind == "blobs" and seen.method == "GET" and self.blobs_at:
            return _answer(307, b"", "text/html", Location=self.blobs_at.rstrip("/") + seen.path)
        if kind != "manifests" or not self.rate_limit:
            return self._pass_on(seen, headers) if self.upstream else self._held(seen, *found.groups())
        limit, window_s = self.rate_limit
        with self._lock:
            self.manifest_gets += seen.method == "GET"
            left = limit - self.manifest_gets
        if left < 0 and seen.method == "GET":
            answer = _error(429, message="You have reached your pull rate limit.")
        else:
            answer = self._pass_on(seen, headers) if self.upstream else self._held(seen, *found.groups())
        answer.headers["ratelimit-limit"] = f"{limit};w={window_s}"
        answer.headers["ratelimit-remaining"] = f"{max(0, left)};w={window_s}"
        return answer

    def _held(self, seen: Seen, name: str, kind: str, reference: str) -> Answer:
        if kind is None:
            return _json(200, {})
        if kind == "blobs":
            return self._blob(reference, seen.range if seen.method == "GET" else "")
        references = sorted(reference for of, reference in list(self.content.manifests) if of == name)
        if not references:
            return _error(404, "NAME_UNKNOWN")
        if kind == "tags":
            return _json(200, {"name": name, "tags": [tag for tag in references if ":" not in tag]})
        if reference not in references:
            return _error(404, "MANIFEST_UNKNOWN")
        media, data = self.content.manifests[name, reference]
        return _answer(200, data, media, Docker_Content_Digest=sha256(data))

    def _blob(self, digest: str, wanted: str) -> Answer:
        data = self.content.blobs.get(digest)
        if data is None:
            return _error(404, "BLOB_UNKNOWN")
        answer = _answer(200, data, "application/octet-stream", Docker_Content_Digest=digest)
        if not self.ranges:
            return answer
        answer.headers["Accept-Ranges"] = "bytes"
        if not (part := re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", wanted)):
            return answer
        first, last, suffix = part.groups()
        start = max(0, len(data) - int(suffix)) if suffix else int(first)
        end = min(int(last) + 1, len(data)) if last else len(data)
        if start >= end:
            return _error(416, "SIZE_INVALID", Content_Range=f"bytes */{len(data)}")
        answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return Answer(206, answer.headers, io.BytesIO(data[start:end]), end - start)

    def _pass_on(self, seen: Seen, headers: Message) -> Answer:
        passed = ["Accept", "If-None-Match", "User-Agent"]
        passed += ["Range"] if self.ranges else []
        passed += ["Authorization"] if not (self.login or self.anonymous) else []
        sent = {name: ", ".join(headers.get_all(name, [])) for name in passed if name in headers}
        url = urlsplit(self.upstream)
        connection = HTTPConnection(url.netloc, timeout=60)
        try:
            connection.request(seen.method, url.path.rstrip("/") + seen.path, headers={**sent, "Connection": "close"})
            response = connection.getresponse()
            if connection.sock:
                connection.sock.close()  # once the response has been read, which holds it too
            kept = {name: value for name, value in response.getheaders() if name.lower() not in OF_THE_CONNECTION}
            if length := response.headers["Content-Length"]:
                return Answer(response.status, kept, response, int(length))
            data = response.read()
        except (OSError, HTTPException) as gone:
            return _error(502, "UNAVAILABLE", f"{self.upstream}: {gone!r}")
        return Answer(response.status, kept, io.BytesIO(data), len(data))

    # --- who may ask ---

    def _is_user(self, headers: Message) -> bool:
        kind, _, value = headers.get("Authorization", "").partition(" ")
        with contextlib.suppress(ValueError):
            return kind.lower() == "basic" and self.login == tuple(base64.b64decode(value).decode().split(":", 1))
        return False

    def _refuse(self, headers: Message, name: str | None) -> Answer | None:
        if not (self.login or self.anonymous):
            return None
        if self.scheme == "basic":
            return None if self._is_user(headers) else _error(401, WWW_Authenticate='Basic realm="test"')
        challenge = f'Bearer realm="http://{headers.get("Host", self.host)}/token",service="test"'
        if name:
            challenge += f',scope="repository:{name}:pull"'
        kind, _, value = headers.get("Authorization", "").partition(" ")
        names, until = self.tokens.get(value, (set(), 0.0))
        if kind.lower() == "bearer":
            if time.monotonic() < until and (not name or name in names):
                return None
            challenge += f',error="{"insufficient_scope" if time.monotonic() < until else "invalid_token"}"'
        return _error(401, WWW_Authenticate=challenge)

    def _token(self, seen: Seen, headers: Message, form: dict[str, list[str]]) -> Answer:
        def said(name: str) -> str:
            return form.get(name, [""])[0]

        if seen.method == "POST" and said("grant_type") == "refresh_token":
            allowed = said("refresh_token") == self.identity_token
        elif seen.method == "POST":
            allowed = self.login == (said("username"), said("password"))
        else:
            allowed = self._is_user(headers) if "Authorization" in headers else self.anonymous
        if not allowed:
            return _error(401)
        asked = re.findall(r"repository:(\S+?):(\S+)", " ".join(form.get("scope", [])))
        names = {name for name, actions in asked if {"pull", "*"} & set(actions.split(","))}
        token = secrets.token_urlsafe(16)
        self.tokens[token] = (names, time.monotonic() + self.token_s)
        given = {"token": token, "access_token": token, "expires_in": int(self.token_s)}
        offline = said("offline_token") == "true" or said("access_type") == "offline"
        return _json(200, {**given, "refresh_token": self.identity_token} if offline and self.login else given)

    # --- what goes wrong, and what is written down ---

    def take(self, seen: Seen, answer: Answer | None = None, body_bytes: int = 0) -> Fault | None:
        """The fault for this request, counted: before there is an answer a `status`, then one that spoils it."""
        with self._lock:
            for fault in list(self.faults):
                left = fault.times is None or fault.hits < fault.times
                fits = fault.spoils(answer, body_bytes) if answer else fault.kind == "status"
                if left and fits and fault.match in seen.line:
                    fault.hits += 1
                    seen.fault = fault.kind
                    return fault
        return None

    def write_down(self, seen: Seen) -> None:
        if self.log:
            with self._lock, self.log.open("a") as log:
                log.write(json.dumps(asdict(seen)) + "\n")

    def control(self, method: str, path: str, body: bytes) -> Answer:
        """/faults and /requests: GET lists, DELETE forgets, POST adds one fault or a list of them."""
        kept: list[Any] = self.faults if path == "/faults" else self.requests
        if method == "DELETE":
            kept.clear()
        elif method == "POST" and path == "/faults":
            try:
                given = json.loads(body)
                kept.extend([Fault(**one) for one in (given if isinstance(given, list) else [given])])
            except (TypeError, ValueError) as wrong:
                return _error(400, "UNSUPPORTED", str(wrong))
        return _json(200, [asdict(one) for one in list(kept)])


class _Server(ThreadingHTTPServer):
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], registry: Registry) -> None:
        self.registry = registry
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the DNS for a name, which a node may wait for
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.registry.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.registry.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that goes is what half the tests are about
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        registry = self.server.registry
        body = self._body()
        named = [self.headers.get(name, "") for name in ("Authorization", "Range", "User-Agent")]
        client = f"{self.client_address[0]}:{self.client_address[1]}"
        seen = Seen(self.command, self.path, named[0].partition(" ")[0], named[1], named[2], client, time.time())
        if (path := urlsplit(self.path).path) in ("/faults", "/requests"):
            self._send(seen, registry.control(self.command, path, body))
            return
        registry.requests.append(seen)
        answer = registry.answer(seen, self.headers, body)
        fault = registry.take(seen, answer, answer.length if self.command != "HEAD" else 0) if not seen.fault else None
        seen.status = 0 if fault and fault.breaks and fault.after_bytes < 0 else answer.status
        registry.write_down(seen)
        with contextlib.closing(answer.body):
            self._send(seen, answer, fault)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":  # which skopeo's POST to /token is
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _send(self, seen: Seen, answer: Answer, fault: Fault | None = None) -> None:
        if fault and fault.breaks and fault.after_bytes < 0:
            if not self._goes_on(fault):
                return
            fault = None
        seen.status = answer.status
        if fault and fault.kind == "wrong_digest":
            answer.headers["Docker-Content-Digest"] = "sha256:" + "0" * 64
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(answer.length)}.items():
            self.send_header(name, value)
        self.end_headers()
        flip = (max(0, fault.after_bytes) or answer.length // 2) if fault and fault.kind == "corrupt" else -1
        if fault and fault.breaks:
            self._copy(seen, answer, fault.after_bytes, flip)
            if not self._goes_on(fault):
                return
        if self.command != "HEAD":
            self._copy(seen, answer, answer.length, flip)

    def _copy(self, seen: Seen, answer: Answer, until: int, flip: int) -> None:
        while seen.sent_bytes < until and (data := answer.body.read(min(CHUNK_BYTES, until - seen.sent_bytes))):
            if 0 <= (at := flip - seen.sent_bytes) < len(data):
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            seen.sent_bytes += len(data)  # before the write, so that who has read it all finds it counted
            self.wfile.write(data)
        self.close_connection |= seen.sent_bytes < until  # the upstream ended early

    def _goes_on(self, fault: Fault) -> bool:
        """After a cut never; after a stall once the fault was cleared, if the client is still there."""
        registry = self.server.registry
        if fault.kind == "stall":
            while fault in registry.faults:
                with contextlib.suppress(BlockingIOError):
                    if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                        break
                if registry.closing.wait(0.02):
                    break
            else:
                return True
        elif fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        self.close_connection = True
        return False

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--state", type=Path, required=True, help="a directory for requests.jsonl")
    for name, what in (("--upstream", "the registry it is laid over"), ("--blobs-at", "another one of these")):
        parser.add_argument(name, default="", metavar="URL", help=what)
    parser.add_argument("--login", type=lambda text: tuple(text.split(":", 1)), metavar="USER:SECRET")
    parser.add_argument("--scheme", choices=("bearer", "basic"), default="bearer")
    parser.add_argument("--anonymous", action="store_true")
    parser.add_argument("--token-s", type=float, default=300)
    parser.add_argument("--identity-token", default="identity-token-for-tests")
    parser.add_argument("--no-ranges", dest="ranges", action="store_false")
    parser.add_argument("--rate-limit", type=lambda text: tuple(map(int, text.split(","))), metavar="GETS,WINDOW_S")
    options = vars(parser.parse_args())
    state: Path = options.pop("state")
    state.mkdir(parents=True, exist_ok=True)
    with Registry(address=options.pop("host"), log=state / "requests.jsonl", **options) as registry:
        print(f"LISTENING {registry.port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
