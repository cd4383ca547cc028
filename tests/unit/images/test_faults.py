"""Registries and networks that fail: patience where it helps, an error where it does not, and nothing wrong is trusted."""

from __future__ import annotations

import datetime
import email.utils
import gzip
import io
import shutil
import socket
import time
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from hpc_workspace.errors import ImageError
from hpc_workspace.images.fetch import require_room
from hpc_workspace.images.registry import OCI_MANIFEST
from tests.registry import Answer, Fault, Registry, sha256
from tests.unit.images.pulling import MIB, FetchingProcess, Puller, at_once, big, executable, oras
from tests.unit.server.running import eventually

BLOBS = "GET /v2/team/app/blobs/"
NOW = {"Retry-After": "0"}
SIZE = 600_000


@pytest.fixture
def image(r: Registry) -> str:
    """An image of 600 kB."""
    r.push_oras("team/app", "1", big(SIZE))
    return oras(r)


def ranges(r: Registry) -> list[str]:
    return [q.range for q in r.seen(BLOBS)]


def nothing_is_trusted(pull: Puller) -> bool:
    blobs = [path for path in pull.store.layers.iterdir() if path.suffix != ".part"]
    return all(f"sha256:{path.name}" == sha256(path.read_bytes()) for path in blobs) and not pull.store.list_images()


# --- asked to wait, and failing ---


@pytest.mark.parametrize(
    ("match", "status"), [("HEAD", 429), ("GET /v2/team/app/manifests", 503), (BLOBS, 500), (BLOBS, 408), (BLOBS, 429)]
)
def test_a_failure_that_may_pass_is_waited_out(r: Registry, pull: Puller, image: str, match: str, status: int) -> None:
    r.faults.append(Fault("status", match=match, status=status, headers=NOW, times=2))
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert pull.told.count(f"{r.host}: HTTP {status}; trying again in 0 s") == 2
    assert len(r.seen(match)) == 3


def test_the_wait_is_as_long_as_the_registry_asks_for(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("status", match="HEAD", status=429, headers={"Retry-After": "1"}, times=1))
    pull.fetch(image)
    first, second = r.seen("HEAD")
    assert 1 <= second.at_s - first.at_s < 2
    assert f"{r.host}: HTTP 429; trying again in 1 s" in pull.told


def test_who_is_asked_to_wait_for_an_hour_is_told_so_at_once(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("status", status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(ImageError, match="too many requests") as caught:
        pull.fetch(image)
    assert "it asks to wait 3600 s" in caught.value.evidence
    assert "images plan" in caught.value.remedy
    assert len(r.requests) == 1
    assert not any("trying again" in text for text in pull.told)


@pytest.mark.parametrize(("status", "why"), [(500, "failed"), (429, "too many requests")])
def test_a_failure_that_does_not_pass_is_an_error(r: Registry, pull: Puller, image: str, status: int, why: str) -> None:
    r.faults.append(Fault("status", match=BLOBS, status=status, headers=NOW))
    with pytest.raises(ImageError, match=f"{r.host} .*{why}") as caught:
        pull.fetch(image)
    assert f"HTTP {status}" in caught.value.evidence
    assert len(r.seen(BLOBS)) == 6
    assert nothing_is_trusted(pull)


@pytest.mark.parametrize("status", [400, 404, 416, 451])
def test_a_failure_that_can_not_pass_is_not_tried_again(r: Registry, pull: Puller, image: str, status: int) -> None:
    r.faults.append(Fault("status", match=BLOBS, status=status))
    with pytest.raises(ImageError):
        pull.fetch(image)
    assert len(r.seen(BLOBS)) == 1


def test_an_image_that_is_not_there_is_named(r: Registry, pull: Puller) -> None:
    with pytest.raises(ImageError, match=f"{r.host} has no team/nosuch:2") as caught:
        pull.fetch(oras(r, "team/nosuch", "2"))
    assert "Check the name" in caught.value.remedy


@pytest.mark.parametrize(
    "said",
    [" 0 ", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 -0000", "Wed, 21 Oct 2015 07:28:00"],
)
def test_a_time_that_is_over_is_no_wait(r: Registry, pull: Puller, image: str, said: str) -> None:
    r.faults.append(Fault("status", match="HEAD", status=429, headers={"Retry-After": said}, times=1))
    pull.fetch(image)
    assert f"{r.host}: HTTP 429; trying again in 0 s" in pull.told


def test_where_it_is_not_said_how_long_the_first_wait_is_a_second(r: Registry, pull: Puller, image: str) -> None:
    headers = {"Retry-After": "\u00b2"}  # a digit, and no number
    r.faults.append(Fault("status", match="HEAD", status=503, headers=headers, times=1))
    pull.fetch(image)
    assert f"{r.host}: HTTP 503; trying again in 1 s" in pull.told


def test_a_date_that_is_far_is_told_as_seconds(r: Registry, pull: Puller, image: str) -> None:
    then = datetime.datetime.now(tz=datetime.UTC) + datetime.timedelta(hours=2)
    r.faults.append(Fault("status", status=429, headers={"Retry-After": email.utils.format_datetime(then)}))
    with pytest.raises(ImageError) as caught:
        pull.fetch(image)
    assert "it asks to wait 7" in caught.value.evidence


@pytest.mark.parametrize(
    "body", ["<html>" + "x" * 50_000, "[" * 16_000, '{"errors": [{"message": "\\u001b[31m' + "y" * 9000 + '"}]}']
)
def test_what_a_registry_says_of_a_failure_fits_on_a_screen(r: Registry, pull: Puller, image: str, body: str) -> None:
    r.faults.append(Fault("status", match="GET", status=400, body=body))
    with pytest.raises(ImageError) as caught:
        pull.fetch(image)
    assert len(str(caught.value)) < 700
    assert "\x1b" not in str(caught.value)


# --- cut off ---


@pytest.mark.parametrize("reset", [False, True])
def test_a_blob_that_was_cut_is_gone_on_with_where_it_was(r: Registry, pull: Puller, image: str, reset: bool) -> None:
    fault = Fault("cut", match=BLOBS, times=2, after_bytes=200_001, reset=reset)
    r.faults.append(fault)
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert fault.hits == 2
    first, second, third = (int(said.removeprefix("bytes=").removesuffix("-") or 0) for said in ranges(r))
    assert first == 0
    assert 0 < second <= 200_001
    assert second < third <= second + 200_001
    if not reset:  # which may take along what is under way
        assert (second, third) == (200_001, 400_002)
        assert sum(q.sent_bytes for q in r.seen(BLOBS)) == SIZE


def test_a_small_blob_too_is_gone_on_with_where_it_was(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", big(5000))
    r.faults.append(Fault("cut", match=BLOBS, times=3, after_bytes=1000))
    assert pull.fetch(oras(r)).read_bytes() == big(5000)
    assert ranges(r) == ["", "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_many_cuts_are_no_reason_to_give_up_while_something_comes(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", big(20_000))
    r.faults.append(Fault("cut", match=BLOBS, after_bytes=1500))
    assert pull.fetch(oras(r)).read_bytes() == big(20_000)
    assert len(ranges(r)) == 14


def test_where_a_registry_can_not_go_on_a_cut_blob_begins_anew(r: Registry, pull: Puller, image: str) -> None:
    r.ranges = False
    r.faults.append(Fault("cut", match=BLOBS, times=1, after_bytes=400_000))
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert ranges(r) == ["", "bytes=400000-"]
    assert [q.status for q in r.seen(BLOBS)] == [200, 200]
    done = [step.done_bytes for step in pull.steps if step.text == "downloading"]
    assert (done[-1], max(d for d in done if d is not None)) == (SIZE, SIZE)


def test_a_connection_that_is_cut_again_and_again_is_an_error(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("cut", match=BLOBS, after_bytes=0))
    with pytest.raises(ImageError, match="again and again") as caught:
        pull.fetch(image)
    assert "is kept" in caught.value.remedy
    assert len(ranges(r)) == 5
    assert nothing_is_trusted(pull)


def test_where_a_registry_can_not_go_on_cuts_here_and_there_are_no_progress(
    r: Registry, pull: Puller, image: str
) -> None:
    r.ranges = False
    for _ in range(20):
        r.faults += [Fault("cut", match=BLOBS, times=1, after_bytes=count) for count in (200_000, 100_000)]
    with pytest.raises(ImageError, match="again and again"):
        pull.fetch(image)
    assert len(ranges(r)) == 6


def test_a_manifest_that_was_cut_is_asked_for_again(r: Registry, pull: Puller, image: str) -> None:
    fault = Fault("cut", match="GET /v2/team/app/manifests/", times=2, after_bytes=50)
    r.faults.append(fault)
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert fault.hits == 2


def test_a_manifest_that_is_always_cut_is_an_error(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("cut", match="GET /v2/team/app/manifests/", after_bytes=50))
    with pytest.raises(ImageError, match="in the middle of a manifest"):
        pull.fetch(image)


def test_a_connection_that_ends_before_any_answer_is_made_again(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("cut", match="HEAD", times=1, after_bytes=-1))
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert any("RemoteProtocolError" in text for text in pull.told)


@pytest.mark.parametrize("failing", [0, 1])
def test_one_layer_that_fails_ends_the_others(
    r: Registry, pull: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    config = r.content.add_blob(b"{}", "application/vnd.oci.image.config.v1+json")
    layers = [r.content.add_blob(big(300_000, seed), "application/vnd.oci.image.layer.v1.tar") for seed in range(2)]
    r.content.add_manifest("team/app", "1", {"mediaType": OCI_MANIFEST, "config": config, "layers": layers})
    stall = Fault("stall", match=layers[1 - failing]["digest"], after_bytes=100_000)
    r.faults += [Fault("status", match=layers[failing]["digest"], status=404), stall]
    executable(tmp_path / "bin" / "apptainer", "#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    running = at_once([lambda: pull.fetch(f"docker://{r.host}/team/app:1")])
    eventually(lambda: r.faults[0].hits)
    r.faults.remove(stall)  # if it was begun it goes on, and ends at its next chunk
    (error,) = running.join()
    assert "has no team/app" in str(error)
    assert nothing_is_trusted(pull)
    assert not list(pull.store.claims.iterdir())


# --- wrong content ---


def test_a_body_with_a_flipped_bit_is_thrown_away_and_fetched_once_more(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("corrupt", match=BLOBS, times=1))
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert ranges(r) == ["", ""]


def test_a_body_that_is_wrong_again_is_an_error_and_nothing_of_it_stays(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("corrupt", match=BLOBS))
    with pytest.raises(ImageError, match="sent something else than sha256:") as caught:
        pull.fetch(image)
    assert "thrown away" in caught.value.what
    assert len(ranges(r)) == 2
    assert nothing_is_trusted(pull)
    assert not list(pull.store.layers.glob("*.part"))
    r.faults.clear()
    assert pull.fetch(image).read_bytes() == big(SIZE)


@pytest.mark.parametrize(
    ("left", "asked"),
    [
        (big(SIZE)[:100_000], ["bytes=100000-"]),  # good: gone on with
        (b"?" * 100_000, ["bytes=100000-", ""]),  # wrong: found out at the end
        (b"?" * SIZE, [""]),  # whole, and wrong
        (big(SIZE) + b"?", [""]),  # longer
        (big(SIZE, 7) * 2, [""]),
        (big(SIZE), []),  # whole, and good
        (b"", [""]),
    ],
    ids=["good start", "wrong start", "wrong", "longer", "longer and wrong", "good", "empty"],
)
def test_what_a_killed_process_left_is_used_and_not_trusted(
    r: Registry, pull: Puller, image: str, left: bytes, asked: list[str]
) -> None:
    pull.store.prepare()
    pull.store.layer_path(sha256(big(SIZE))).with_suffix(".part").write_bytes(left)
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert ranges(r) == asked
    assert pull.steps[-1].done_bytes == SIZE


def test_a_link_in_place_of_a_part_is_not_followed(r: Registry, pull: Puller, image: str, tmp_path: Path) -> None:
    pull.store.prepare()
    (tmp_path / "victim").write_bytes(b"precious")
    pull.store.layer_path(sha256(big(SIZE))).with_suffix(".part").symlink_to(tmp_path / "victim")
    with pytest.raises(ImageError):
        pull.fetch(image)
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("size", [10, 300_000, SIZE - 1])
def test_a_body_that_is_longer_than_it_should_be_is_refused(r: Registry, pull: Puller, image: str, size: int) -> None:
    manifest = r.manifest("team/app", "1")
    manifest["layers"][0]["size"] = size
    r.content.add_manifest("team/app", "1", manifest)
    with pytest.raises(ImageError, match=f"more than the {size} bytes"):
        pull.fetch(image)
    assert nothing_is_trusted(pull)
    assert all(path.stat().st_size <= size for path in pull.store.layers.glob("*.part"))


def test_a_body_that_is_shorter_than_it_should_be_is_refused(r: Registry, pull: Puller, image: str) -> None:
    manifest = r.manifest("team/app", "1")
    manifest["layers"][0]["size"] = SIZE + 5
    r.content.add_manifest("team/app", "1", manifest)
    with pytest.raises(ImageError):
        pull.fetch(image)
    assert nothing_is_trusted(pull)


def test_a_manifest_that_is_not_what_was_asked_for_is_refused(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("corrupt", match="GET /v2/team/app/manifests/"))
    with pytest.raises(ImageError, match="sent another manifest"):
        pull.fetch(image)
    digest = sha256(r.content.manifests["team/app", "1"][1])
    with pytest.raises(ImageError, match="sent another manifest"):
        pull.fetch(f"oras://{r.host}/team/app@{digest}")
    assert not list(pull.store.layers.iterdir())
    assert not r.seen("/blobs/")


def test_a_digest_that_the_registry_does_not_have_after_all_is_refused(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("wrong_digest", match="HEAD"))
    with pytest.raises(ImageError):
        pull.fetch(image)


def test_a_manifest_of_five_mebibytes_is_refused_before_it_is_all_here(r: Registry, pull: Puller, image: str) -> None:
    r.content.add_manifest("team/app", "1", {**r.manifest("team/app", "1"), "annotations": {"x": "y" * (5 * MIB)}})
    with pytest.raises(ImageError, match="larger than 4 MiB"):
        pull.fetch(image)
    assert not list(pull.store.layers.iterdir())


def test_a_manifest_in_the_store_that_was_changed_is_fetched_again(r: Registry, pull: Puller, image: str) -> None:
    pull.resolve(image)
    (manifest,) = pull.store.layers.iterdir()
    manifest.write_bytes(manifest.read_bytes().replace(b"sha256:", b"SHA256:"))
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert sha256(manifest.read_bytes()) == f"sha256:{manifest.name}"


def test_a_proxy_that_compresses_is_asked_not_to(pull: Puller, root: Path) -> None:
    class Compressing(Registry):
        def _blob(self, digest: str, wanted: str) -> Answer:
            answer = super()._blob(digest, wanted)
            if "gzip" in self.accepted:
                data = gzip.compress(answer.body.read())
                return Answer(
                    answer.status,
                    {**answer.headers, "Content-Encoding": "gzip"},
                    io.BytesIO(data),
                    len(data),
                )
            return answer

        def answer(self, seen: Any, headers: Message, body: bytes) -> Answer:
            self.accepted = headers.get("Accept-Encoding", "")
            return super().answer(seen, headers, body)

    with Compressing() as r:
        r.push_oras("team/app", "1", big(MIB))
        assert Puller(root, r).fetch(oras(r)).read_bytes() == big(MIB)


# --- redirects ---


def test_blobs_may_come_from_another_host_which_gets_no_authorization(
    r: Registry, root: Path, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPTAINER_DOCKER_USERNAME", "ada")
    monkeypatch.setenv("APPTAINER_DOCKER_PASSWORD", "pw")
    with Registry(content=r.content) as other:
        r.login = ("ada", "pw")
        r.blobs_at = f"http://localhost:{other.port}"
        other.faults.append(Fault("cut", times=1, after_bytes=100_000))
        assert Puller(root, r).fetch(image).read_bytes() == big(SIZE)
        assert {q.authorization for q in r.seen(BLOBS)} == {"Bearer"}
        assert [(q.authorization, q.range) for q in other.requests] == [("", ""), ("", "bytes=100000-")]


@pytest.mark.parametrize("scheme", ["bearer", "basic"])
def test_a_host_that_blobs_are_sent_on_to_gets_no_login_even_if_it_asks(
    r: Registry, root: Path, image: str, monkeypatch: pytest.MonkeyPatch, scheme: Any
) -> None:
    monkeypatch.setenv("APPTAINER_DOCKER_USERNAME", "ada")
    monkeypatch.setenv("APPTAINER_DOCKER_PASSWORD", "pw")
    with Registry(content=r.content, login=("ada", "pw"), scheme=scheme) as other:
        r.blobs_at = f"http://localhost:{other.port}"
        with pytest.raises(ImageError):
            Puller(root, r).fetch(image)
        assert {q.authorization for q in other.requests} == {""}
        assert not other.seen("/token")


def test_redirects_without_end_are_an_error(r: Registry, pull: Puller, image: str) -> None:
    r.blobs_at = r.url
    with pytest.raises(ImageError, match="can't be reached") as caught:
        pull.fetch(image)
    assert "TooManyRedirects" in caught.value.evidence
    assert not any("trying again" in text for text in pull.told)


# --- no way there ---


def test_a_registry_without_tls_is_told_from_one_that_is_not_there(r: Registry, root: Path, image: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ImageError, match="can't be reached") as caught:
        Puller(root).fetch(image)
    assert time.monotonic() - begun < 1  # no second try helps
    assert f"HPC_WORKSPACE_IMAGES_PLAIN_HTTP={r.host}" in caught.value.remedy
    assert not r.requests


def test_apptainers_own_variable_allows_plain_http(root: Path, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPTAINER_NOHTTPS", "true")
    assert Puller(root).fetch(image).read_bytes() == big(SIZE)


def test_a_proxy_is_named_without_its_password(pull: Puller, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("HTTP_PROXY", f"http://ada:s3cret@127.0.0.1:{port}")
    with pytest.raises(ImageError, match="can't be reached") as caught:
        pull.fetch(image)
    assert f"(now http://127.0.0.1:{port})" in caught.value.remedy
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://ada:s3cret@127.0.0.1:1080"),
        ("HTTPS_PROXY", "ftp://ada:s3cret@127.0.0.1:1"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem"),
    ],
)
def test_an_environment_that_can_not_be_used_is_named_as_that(
    pull: Puller, image: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ImageError, match="the environment names a proxy or certificates") as caught:
        pull.fetch(image)
    assert "s3cret" not in str(caught.value)


# --- killed ---


def test_what_a_process_that_was_killed_in_a_download_left_is_gone_on_with_at_once(
    r: Registry, pull: Puller, root: Path, image: str
) -> None:
    r.faults.append(Fault("stall", match=BLOBS, times=1, after_bytes=400_000))
    process = FetchingProcess(root, r, image)
    process.go()
    eventually(lambda: list(pull.store.layers.glob("*.part")) and pull.part().stat().st_size >= 390_000)
    left = pull.part().stat().st_size
    process.kill()
    assert nothing_is_trusted(pull)
    assert len(list(pull.store.claims.iterdir())) == 3  # the name's, the image's and the layer's: of a dead holder
    begun = time.monotonic()
    assert pull.fetch(image).read_bytes() == big(SIZE)
    assert time.monotonic() - begun < 5
    assert ranges(r) == ["", f"bytes={left}-"]
    assert not list(pull.store.claims.iterdir())
    assert not list(pull.store.layers.glob("*.part"))
    assert not pull.is_waiting


def test_a_holder_that_was_only_slow_and_its_successor_do_each_other_no_harm(
    r: Registry, pull: Puller, root: Path, image: str
) -> None:
    stall = Fault("stall", match=BLOBS, times=1, after_bytes=400_000)
    r.faults.append(stall)
    process = FetchingProcess(root, r, image)
    process.go()
    eventually(lambda: list(pull.store.layers.glob("*.part")) and pull.part().stat().st_size >= 390_000)
    for claim in pull.store.claims.iterdir():
        claim.unlink()  # as a follower does that takes it for dead
    path = pull.fetch(image)
    r.faults.clear()
    assert process.paths() == [str(path)]
    assert path.read_bytes() == big(SIZE)


# --- room ---


def test_a_disk_without_the_room_is_an_error_that_says_how_much_it_takes(tmp_path: Path) -> None:
    require_room({tmp_path: 1}, what="download it")
    with pytest.raises(ImageError, match=f"not enough room in {tmp_path} to download it") as caught:
        require_room({tmp_path: 10**18}, what="download it")
    assert caught.value.evidence.startswith("It takes about 1000000.0 TB; ")
    assert caught.value.evidence.endswith(" are free.")
    assert "images prune" in caught.value.remedy


def test_needs_of_one_disk_add_up(tmp_path: Path) -> None:
    more_than_half = int(shutil.disk_usage(tmp_path).free * 0.6)
    other = tmp_path / "other"
    other.mkdir()
    require_room({tmp_path: more_than_half}, what="x")
    require_room({other: more_than_half}, what="x")
    with pytest.raises(ImageError, match="not enough room"):
        require_room({tmp_path: more_than_half, other: more_than_half}, what="x")


def test_room_is_asked_for_before_anything_is_downloaded(r: Registry, pull: Puller, image: str) -> None:
    manifest = r.manifest("team/app", "1")
    manifest["layers"][0]["size"] = 10**17
    r.content.add_manifest("team/app", "1", manifest)
    with pytest.raises(ImageError, match="not enough room"):
        pull.fetch(image)
    assert not r.seen(BLOBS)
