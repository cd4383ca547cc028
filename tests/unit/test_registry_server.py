"""The registry the image tests pull from does what it says: real HTTP on loopback, and each of its faults."""

from __future__ import annotations

import base64
import gzip
import http.client
import io
import json
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from tests import registry as module
from tests.registry import Fault, Registry, sha256

OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
BIG = bytes(range(256)) * 4096


def ask(url: str, method: str = "GET", data: bytes | None = None, **headers: str) -> tuple[int, Message, bytes]:
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - our own http:// addresses
    try:
        with OPEN(request, timeout=10) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers, refused.read()


def basic(user: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()


def code_of(body: bytes) -> str:
    code: str = json.loads(body)["errors"][0]["code"]
    return code


@pytest.fixture
def r() -> Iterator[Registry]:
    with Registry() as registry:
        yield registry


def blob(r: Registry, data: bytes = BIG) -> str:
    """The URL of a blob with just these bytes."""
    r.push_oras("team/app", "sif", data)
    return f"{r.url}/v2/team/app/blobs/{sha256(data)}"


# --- content ---


@pytest.mark.parametrize("media", ["oci", "docker"])
def test_what_is_pushed_can_be_pulled(r: Registry, media: Any) -> None:
    digest = r.push(
        "team/app",
        files={"bin/hello": b"#!/bin/sh\n"},
        layers=[{"etc/x": b"1"}],
        media=media,
        entrypoint=["/bin/hello"],
    )
    status, headers, body = ask(f"{r.url}/v2/team/app/manifests/latest")
    assert (status, headers["Docker-Content-Digest"], sha256(body)) == (200, digest, digest)
    manifest = json.loads(body)
    assert headers["Content-Type"] == manifest["mediaType"] and media in manifest["mediaType"]
    assert (
        ask(f"{r.url}/v2/team/app/manifests/{digest}")[2]
        == body
        == json.dumps(r.manifest("team/app"), indent=2).encode()
    )
    config = json.loads(ask(f"{r.url}/v2/team/app/blobs/{manifest['config']['digest']}")[2])
    assert config["os"] == "linux" and config["config"]["Entrypoint"] == ["/bin/hello"]
    for layer, diff_id, name in zip(
        manifest["layers"], config["rootfs"]["diff_ids"], ("bin/hello", "etc/x"), strict=True
    ):
        packed = ask(f"{r.url}/v2/team/app/blobs/{layer['digest']}")[2]
        assert (len(packed), sha256(packed), sha256(gzip.decompress(packed))) == (
            layer["size"],
            layer["digest"],
            diff_id,
        )
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            assert tar.getnames() == [name]


def test_a_head_has_the_length_and_no_body(r: Registry) -> None:
    r.push("a", files={})
    status, headers, body = ask(f"{r.url}/v2/a/manifests/latest", "HEAD")
    assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 100
    assert ask(f"{r.url}/v2/a/tags/list")[2] == b'{"name": "a", "tags": ["latest"]}'


def test_an_index_has_another_digest_for_each_platform(r: Registry) -> None:
    digest = r.push("a", files={"x": b""}, platforms=["linux/amd64", "linux/arm64/v8"])
    each = r.platforms("a")
    assert list(each) == ["linux/amd64", "linux/arm64/v8"] and len({digest, *each.values()}) == 3
    for one in each.values():
        assert ask(f"{r.url}/v2/a/manifests/{one}")[1]["Docker-Content-Digest"] == one


def test_a_tag_moves_and_what_it_named_stays(r: Registry) -> None:
    old, new = r.push("a", files={"x": b"1"}), r.push("a", files={"x": b"2"})
    assert ask(f"{r.url}/v2/a/manifests/latest", "HEAD")[1]["Docker-Content-Digest"] == new != old
    assert ask(f"{r.url}/v2/a/manifests/{old}", "HEAD")[0] == 200


def test_what_is_not_there_is_named(r: Registry) -> None:
    r.push("a", files={})
    for path, code in {
        "b/manifests/latest": "NAME_UNKNOWN",
        "a/manifests/none": "MANIFEST_UNKNOWN",
        "a/blobs/sha256:0": "BLOB_UNKNOWN",
    }.items():
        status, _, body = ask(f"{r.url}/v2/{path}")
        assert (status, code_of(body)) == (404, code)
    assert ask(f"{r.url}/v2/")[0] == 200
    assert ask(f"{r.url}/v2/a/manifests/latest", "PUT", b"{}")[0] == 405


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-", 100, len(BIG)),
        ("bytes=5-99999999", 5, len(BIG)),
        ("bytes=-7", len(BIG) - 7, len(BIG)),
    ],
)
def test_a_range_is_a_206(r: Registry, wanted: str, start: int, end: int) -> None:
    status, headers, body = ask(blob(r), Range=wanted)
    assert (status, headers["Content-Range"], body) == (206, f"bytes {start}-{end - 1}/{len(BIG)}", BIG[start:end])
    assert (r.requests[-1].range, r.requests[-1].sent_bytes) == (wanted, end - start)


def test_a_range_beyond_the_end_is_a_416_and_may_be_ignored_altogether(r: Registry) -> None:
    url = blob(r)
    status, headers, _ = ask(url, Range=f"bytes={len(BIG)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(BIG)}")
    r.ranges = False
    assert ask(url, Range="bytes=100-")[::2] == (200, BIG)


# --- faults ---


def test_a_status_is_given_so_many_times(r: Registry) -> None:
    r.push("a", files={})
    r.faults.append(Fault("status", match="GET /v2/a/manifests/", times=2, status=429, headers={"Retry-After": "3"}))
    assert ask(f"{r.url}/v2/a/manifests/latest", "HEAD")[0] == 200
    status, headers, body = ask(f"{r.url}/v2/a/manifests/latest")
    assert (status, headers["Retry-After"], code_of(body)) == (429, "3", "TOOMANYREQUESTS")
    assert [ask(f"{r.url}/v2/a/manifests/latest")[0] for _ in range(2)] == [429, 200]
    assert [(q.status, q.fault) for q in r.seen("/a/")] == [(200, ""), (429, "status"), (429, "status"), (200, "")]


def test_a_portal_may_answer_in_its_place(r: Registry) -> None:
    r.faults.append(Fault("status", status=200, body="<html>log in"))
    status, headers, body = ask(f"{r.url}/v2/")
    assert (status, headers["Content-Type"], body) == (200, "text/html", b"<html>log in")


def test_a_cut_sends_so_many_bytes_and_the_rest_can_be_fetched(r: Registry) -> None:
    url = blob(r)
    r.faults.append(Fault("cut", match="GET /v2/team/app/blobs/", times=1, after_bytes=70_000))
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(url)
    assert cut.value.partial == BIG[:70_000] and cut.value.expected == len(BIG) - 70_000
    assert cut.value.partial + ask(url, Range="bytes=70000-")[2] == BIG


@pytest.mark.parametrize("after_bytes", [-1, 0, 10])
def test_a_reset_is_one(r: Registry, after_bytes: int) -> None:
    url = blob(r)
    r.faults.append(Fault("cut", times=1, after_bytes=after_bytes, reset=True))
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        ask(url)
    assert ask(url)[2] == BIG
    assert [q.status for q in r.requests] == [0 if after_bytes < 0 else 200, 200]


def test_a_stall_ends_when_it_is_cleared(r: Registry) -> None:
    r.faults.append(Fault("stall", match="/blobs/", after_bytes=10))
    connection = http.client.HTTPConnection(r.host, timeout=10)
    connection.request("GET", blob(r).removeprefix(r.url))
    answer = connection.getresponse()
    assert answer.read(10) == BIG[:10]
    connection.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        connection.sock.recv(1)
    assert (r.requests[0].sent_bytes, r.requests[0].status) == (10, 200)
    connection.sock.settimeout(10)
    r.faults.clear()
    rest = b""
    while len(rest) < len(BIG) - 10:
        rest += connection.sock.recv(1 << 20)
    assert rest == BIG[10:]
    connection.close()


def test_a_stall_ends_when_the_client_goes(r: Registry) -> None:
    r.faults.append(Fault("stall", after_bytes=-1))
    with socket.create_connection((r.address, r.port)) as client:
        client.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: r.faults[0].hits == 1)
    until(lambda: not r.connections)


def test_a_stall_ends_when_the_registry_closes() -> None:
    with Registry() as r:
        r.faults.append(Fault("stall", after_bytes=-1))
        client = socket.create_connection((r.address, r.port), timeout=10)
        client.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: r.faults[0].hits == 1)
    assert client.recv(1) == b""
    client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((r.address, r.port))


@pytest.mark.parametrize(("after_bytes", "at"), [(0, len(BIG) // 2), (3, 3)])
def test_corrupt_is_one_byte(r: Registry, after_bytes: int, at: int) -> None:
    url = blob(r)
    r.faults.append(Fault("corrupt", times=1, after_bytes=after_bytes))
    body = ask(url)[2]
    assert [i for i in range(len(BIG)) if body[i] != BIG[i]] == [at] and len(body) == len(BIG)
    assert ask(url)[2] == BIG


def test_a_wrong_digest_is_in_the_header_alone(r: Registry) -> None:
    digest = r.push("a", files={})
    r.faults.append(Fault("wrong_digest"))
    assert ask(f"{r.url}/v2/")[0] == 200 and r.faults[0].hits == 0
    _, headers, body = ask(f"{r.url}/v2/a/manifests/latest")
    assert headers["Docker-Content-Digest"] != digest == sha256(body)


def test_a_body_fault_waits_for_an_answer_it_can_spoil() -> None:
    with Registry(anonymous=True) as r:
        url = blob(r)
        r.faults.append(Fault("cut", match="/blobs/", times=1, after_bytes=5))
        assert ask(url)[0] == 401 and r.faults[0].hits == 0
        token = json.loads(ask(f"{r.url}/token?scope=repository:team/app:pull")[2])["token"]
        assert ask(url, "HEAD", Authorization=f"Bearer {token}")[0] == 200 and r.faults[0].hits == 0
        with pytest.raises(http.client.IncompleteRead):
            ask(url, Authorization=f"Bearer {token}")


def test_no_other_fault_is_known() -> None:
    with pytest.raises(ValueError, match="no such fault"):
        Fault("slow")  # type: ignore[arg-type]


# --- login ---


def test_a_bearer_login_goes_by_the_token_page() -> None:
    with Registry(login=("ada", "p:w")) as r:
        r.push("team/app", files={})
        page, tokens = (
            f"{r.url}/v2/team/app/manifests/latest",
            f"{r.url}/token?service=test&scope=repository:team/app:pull",
        )
        status, headers, body = ask(page, Authorization=basic("ada", "p:w"))
        assert (status, code_of(body)) == (401, "UNAUTHORIZED")
        assert (
            headers["WWW-Authenticate"]
            == f'Bearer realm="{r.url}/token",service="test",scope="repository:team/app:pull"'
        )
        assert [ask(tokens)[0], ask(tokens, Authorization=basic("ada", "no"))[0]] == [401, 401]
        given = json.loads(ask(tokens, Authorization=basic("ada", "p:w"))[2])
        assert given["expires_in"] == 300 and "refresh_token" not in given
        bearer = "Bearer " + given["token"]
        assert ask(page, Authorization=bearer)[0] == ask(f"{r.url}/v2/", Authorization=bearer)[0] == 200
        status, headers, _ = ask(f"{r.url}/v2/other/manifests/latest", Authorization=bearer)
        assert status == 401 and 'error="insufficient_scope"' in headers["WWW-Authenticate"]
        r.tokens.clear()
        status, headers, _ = ask(page, Authorization=bearer)
        assert status == 401 and 'error="invalid_token"' in headers["WWW-Authenticate"]
        assert {q.authorization for q in r.requests} == {"", "Basic", "Bearer"}
        assert "p:w" not in repr(r) and given["token"] not in repr(r.requests)


def test_an_identity_token_is_a_refresh_token() -> None:
    with Registry(login=("ada", "pw"), token_s=0.05) as r:
        r.push("a", files={})
        form = "grant_type=refresh_token&service=test&scope=repository:a:pull&refresh_token="
        assert ask(f"{r.url}/token", "POST", (form + "wrong").encode())[0] == 401
        token = json.loads(ask(f"{r.url}/token", "POST", (form + r.identity_token).encode())[2])["access_token"]
        until(lambda: ask(f"{r.url}/v2/a/manifests/latest", Authorization=f"Bearer {token}")[0] == 401)
        connection = http.client.HTTPConnection(r.host, timeout=10)
        parts = [(form + r.identity_token).encode()[:40], (form + r.identity_token).encode()[40:]]
        for _ in range(2):  # as skopeo asks: chunked, and the connection is fit for the next
            connection.request(
                "POST", "/token", iter(parts), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
            )
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read()
        connection.close()


def test_a_basic_login_is_asked_for_each_time() -> None:
    with Registry(login=("ada", "pw"), scheme="basic") as r:
        r.push("a", files={})
        status, headers, _ = ask(f"{r.url}/v2/a/manifests/latest")
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="test"')
        assert ask(f"{r.url}/v2/a/manifests/latest", Authorization=basic("ada", "no"))[0] == 401
        assert ask(f"{r.url}/v2/a/manifests/latest", Authorization=basic("ada", "pw"))[0] == 200


# --- between two ---


def test_blobs_may_be_at_another_host_which_sees_what_came_along() -> None:
    with Registry(address="127.0.0.2") as store, Registry(content=store.content, blobs_at=store.url) as r:
        assert ask(blob(r), Authorization="Bearer x")[2] == BIG  # urllib takes every header along
        assert ([q.status for q in r.requests], [q.authorization for q in store.requests]) == ([307], ["Bearer"])


def test_it_can_be_laid_over_a_registry() -> None:
    with Registry(login=("ada", "pw"), scheme="basic") as real, Registry(upstream=real.url) as r:
        digest = real.push("team/app", files={})
        page, user = f"{r.url}/v2/team/app/manifests/latest", basic("ada", "pw")
        status, headers, _ = ask(page)
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="test"')
        for method in ("GET", "HEAD"):
            status, headers, _ = ask(page, method, Authorization=user)
            assert (status, headers["Docker-Content-Digest"]) == (200, digest)
        url = blob(real).replace(real.url, r.url)
        assert ask(url, Authorization=user, Range="bytes=9-11")[::2] == (206, BIG[9:12])
        r.faults.append(Fault("cut", match="/blobs/", after_bytes=100))
        with pytest.raises(http.client.IncompleteRead):
            ask(url, Authorization=user)
        real.close()
        assert ask(page)[0] == 502


def test_the_rate_limit_counts_gets_of_manifests(r: Registry) -> None:
    r.push("a", files={})
    r.rate_limit = (2, 21600)
    page = f"{r.url}/v2/a/manifests/latest"
    said = [ask(page, method)[:2] for method in ("HEAD", "GET", "GET", "HEAD", "GET")]
    assert [status for status, _ in said] == [200, 200, 200, 200, 429]
    assert [headers["ratelimit-remaining"] for _, headers in said] == [f"{n};w=21600" for n in (2, 1, 0, 0, 0)]
    assert said[0][1]["ratelimit-limit"] == "2;w=21600"


def test_one_connection_is_kept_and_many_are_served(r: Registry) -> None:
    connection = http.client.HTTPConnection(r.host, timeout=10)
    for _ in range(3):
        connection.request("GET", "/v2/")
        connection.getresponse().read()
    assert len({q.client for q in r.requests}) == 1
    connection.close()
    url, bodies = blob(r), []
    threads = [threading.Thread(target=lambda: bodies.append(ask(url)[2])) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bodies == [BIG] * 20


# --- as a script ---


def test_as_a_script_it_is_told_its_faults_over_http(tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-I",
        module.__file__,
        "--port",
        "0",
        "--state",
        str(tmp_path / "state"),
        "--rate-limit",
        "9,60",
    ]
    with (
        Registry() as real,
        subprocess.Popen([*argv, "--upstream", real.url], stdout=subprocess.PIPE, text=True) as script,
    ):
        try:
            real.push("a", files={})
            assert script.stdout
            url = f"http://127.0.0.1:{script.stdout.readline().removeprefix('LISTENING ').strip()}"
            assert ask(f"{url}/v2/a/manifests/latest")[1]["ratelimit-remaining"] == "8;w=60"
            assert (
                ask(f"{url}/faults", "POST", json.dumps([{"kind": "status", "status": 500, "times": 1}]).encode())[0]
                == 200
            )
            assert ask(f"{url}/faults", "POST", b'{"kind": "none"}')[0] == 400
            assert ask(f"{url}/v2/a/manifests/latest")[0] == 500
            assert [fault["hits"] for fault in json.loads(ask(f"{url}/faults")[2])] == [1]
            assert ask(f"{url}/faults", "DELETE")[2] == b"[]"
            assert ask(f"{url}/v2/a/manifests/latest")[0] == 200
            seen = json.loads(ask(f"{url}/requests")[2])
            lines = [json.loads(line) for line in (tmp_path / "state" / "requests.jsonl").read_text().splitlines()]
            assert [q["status"] for q in seen] == [q["status"] for q in lines] == [200, 500, 200]
        finally:
            script.kill()


def until(reached: Any) -> None:
    for _ in range(500):
        if reached():
            return
        time.sleep(0.01)
    raise AssertionError("not within 5 s")
