"""Fetches: each image once, however many ask, and as new as the policy asks for. Real HTTP, threads and processes."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_workspace import images
from hpc_workspace.config import ImageSettings
from hpc_workspace.errors import ConfigError, ImageError
from hpc_workspace.images.inventory import verify
from hpc_workspace.images.store import Store
from hpc_workspace.options import PullPolicy
from tests.registry import Fault, Registry
from tests.unit.images.pulling import FetchingProcess, Puller, at_once, big, oras, sif
from tests.unit.server.running import eventually

Pullers = Callable[[int], list[Puller]]


def resolve(image: str, root: Path, r: Registry, policy: PullPolicy) -> str:
    return images.resolve(
        image,
        runtime="auto",
        store=root,
        platform="linux/amd64",
        pull_policy=policy,
        settings=ImageSettings(plain_http=[r.host]),
        tell=lambda step: None,
    )


# --- once ---


def test_sixteen_threads_make_one_blob_request_and_one_manifest_get(r: Registry, pullers: Pullers) -> None:
    r.push_oras("team/app", "1", sif(b"content"))
    fault = Fault("stall", match="/blobs/", after_bytes=10)
    r.faults.append(fault)
    all_ = pullers(16)
    running = at_once([lambda p=p: p.fetch(oras(r)) for p in all_])
    eventually(lambda: sum(p.is_waiting for p in all_) == 15)
    r.faults.clear()
    paths = running.join()
    assert len(set(paths)) == 1
    assert Path(str(paths[0])).read_bytes() == sif(b"content")
    assert [q.method for q in r.requests] == ["HEAD", "GET", "GET"]
    assert len(r.seen("GET /v2/team/app/manifests/")) == 1


def test_four_processes_of_four_threads_make_one_blob_request_and_one_manifest_get(r: Registry, root: Path) -> None:
    r.push_oras("team/app", "1", big(300_000))
    processes = [FetchingProcess(root, r, oras(r), threads=4) for _ in range(4)]
    for process in processes:
        process.go()
    paths = [path for process in processes for path in process.paths()]
    assert len(paths) == 16
    assert len(set(paths)) == 1
    assert Path(paths[0]).read_bytes() == big(300_000)
    assert len(r.seen("/blobs/")) == 1
    assert len(r.seen("GET /v2/team/app/manifests/")) == 1


def test_what_failed_for_one_is_tried_by_the_next_who_waits(r: Registry, pullers: Pullers) -> None:
    r.push_oras("team/app", "1", sif())
    r.faults.append(Fault("status", status=404, match="HEAD", times=1))
    results = at_once([lambda p=p: p.fetch(oras(r)) for p in pullers(4)]).join()
    failed = [result for result in results if isinstance(result, ImageError)]
    assert len(failed) == 1
    assert len({result for result in results if isinstance(result, Path)}) == 1


def test_a_fetch_leaves_an_image_its_name_and_no_claim(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif(b"x"))
    path = pull.fetch(oras(r))
    assert path.parent == pull.store.images
    assert sorted(p.suffix for p in pull.store.images.iterdir()) == [".json", ".sif"]
    assert len(list(pull.store.refs.iterdir())) == 1
    assert not list(pull.store.claims.iterdir())
    assert not list(pull.store.work.iterdir())
    assert not list(pull.store.layers.glob("*.part"))
    facts = pull.store.read_facts(path)
    assert facts is not None
    assert (facts.reference, facts.size_bytes) == (oras(r), len(sif(b"x")))
    assert not [checked for checked in verify(pull.store, lambda _: None) if checked.wrong]


def test_progress_counts_from_nothing_to_all(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", big(500_000))
    pull.fetch(oras(r))
    done = [step.done_bytes for step in pull.steps if step.text == "downloading"]
    assert done[0] == 0
    assert done[-1] == 500_000
    assert done == sorted(done)
    assert {step.total_bytes for step in pull.steps if step.text == "downloading"} == {500_000}
    assert pull.told[0] == f"asking {r.host}"


# --- what is shared ---


def test_two_names_of_one_image_share_one_file(r: Registry, pull: Puller) -> None:
    assert r.push_oras("team/app", "1", sif()) == r.push_oras("team/app", "2", sif())
    assert pull.fetch(oras(r, tag="1")) == pull.fetch(oras(r, tag="2"))
    assert len(r.seen("/blobs/")) == 1
    assert len(r.seen("GET /v2/team/app/manifests/")) == 1
    assert len(pull.store.list_refs()) == 2


def test_two_images_that_share_a_layer_fetch_it_once(r: Registry, pull: Puller) -> None:
    assert r.push_oras("team/app", "1", sif()) != r.push_oras("team/other", "1", sif())
    assert pull.fetch(oras(r)) != pull.fetch(oras(r, "team/other"))
    assert len(r.seen("/blobs/")) == 1


def test_two_images_that_share_a_layer_fetch_it_once_when_asked_for_at_once(r: Registry, pullers: Pullers) -> None:
    names = [f"team/app{i}" for i in range(6)]
    for name in names:
        r.push_oras(name, "1", sif(b"shared"))
    fault = Fault("stall", match="/blobs/", after_bytes=5)
    r.faults.append(fault)
    running = at_once([lambda p=p, n=n: p.fetch(oras(r, n)) for p, n in zip(pullers(6), names, strict=True)])
    eventually(lambda: len(r.seen("GET")) == 7 and fault.hits == 1)  # six manifests and one blob
    r.faults.clear()
    paths = running.join()
    assert len(set(paths)) == 6
    assert {Path(str(path)).read_bytes() for path in paths} == {sif(b"shared")}
    assert len(r.seen("/blobs/")) == 1


def test_images_that_share_a_layer_can_all_be_fetched_anew_at_once(r: Registry, pullers: Pullers) -> None:
    names = [f"team/app{i}" for i in range(8)]
    for name in names:
        r.push_oras(name, "1", sif(b"shared"))
    for _ in range(3):
        calls = [lambda p=p, n=n: p.fetch(oras(r, n), "always") for p, n in zip(pullers(8), names, strict=True)]
        for result in at_once(calls).join():
            assert isinstance(result, Path), result
            assert result.read_bytes() == sif(b"shared")


def test_another_platform_is_another_image(r: Registry, root: Path, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif())
    other = Puller(root, r, platform="linux/arm64/v8")
    assert pull.fetch(oras(r)) != other.fetch(oras(r))
    assert other.fetch(oras(r)).name.endswith("-linux-arm64-v8.sif")
    assert len(r.seen("/blobs/")) == 1


# --- policies ---


def test_missing_takes_what_is_there_without_any_request(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif())
    path = pull.fetch(oras(r))
    r.requests.clear()
    r.push_oras("team/app", "1", sif(b"moved"))
    assert pull.fetch(oras(r)) == path
    assert not r.requests


def test_newer_asks_for_the_digest_and_fetches_nothing_that_is_there(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif())
    path = pull.fetch(oras(r))
    r.requests.clear()
    assert pull.fetch(oras(r), "newer") == path
    assert [q.method for q in r.requests] == ["HEAD"]


def test_newer_fetches_a_tag_that_moved_to_a_new_path_and_the_old_one_stays(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif(b"old"))
    old = pull.fetch(oras(r))
    r.push_oras("team/app", "1", sif(b"new"))
    new = pull.fetch(oras(r), "newer")
    assert (old.read_bytes(), new.read_bytes()) == (sif(b"old"), sif(b"new"))
    assert pull.fetch(oras(r)) == new
    r.push_oras("team/app", "1", sif(b"old"))
    r.requests.clear()
    assert pull.fetch(oras(r), "newer") == old
    assert not r.seen("/blobs/")


def test_many_who_want_the_newest_at_once_ask_once(r: Registry, pullers: Pullers) -> None:
    r.push_oras("team/app", "1", sif(b"old"))
    all_ = pullers(8)
    all_[0].fetch(oras(r))
    r.push_oras("team/app", "1", sif(b"new"))
    r.requests.clear()
    r.faults.append(Fault("stall", match="HEAD", after_bytes=-1))
    running = at_once([lambda p=p: p.fetch(oras(r), "newer") for p in all_])
    eventually(lambda: sum(p.is_waiting for p in all_) == 7)
    r.faults.clear()
    assert {Path(str(path)).read_bytes() for path in running.join()} == {sif(b"new")}
    assert [q.method for q in r.requests] == ["HEAD", "GET", "GET"]


def test_newer_takes_what_is_there_with_a_warning_when_the_registry_is_silent(
    r: Registry, pull: Puller, caplog: pytest.LogCaptureFixture
) -> None:
    r.push_oras("team/app", "1", sif())
    path = pull.fetch(oras(r))
    r.close()
    with caplog.at_level(logging.WARNING):
        assert pull.fetch(oras(r), "newer") == path
    assert "taking what the store has" in caplog.text
    assert r.host in caplog.text


def test_a_silent_registry_is_an_error_where_nothing_is_there(r: Registry, pull: Puller) -> None:
    r.close()
    with pytest.raises(ImageError, match="can't be reached") as caught:
        pull.fetch(oras(r), "newer")
    assert caught.value.what.startswith("Failed to pull and convert Docker image oras://")
    assert "images.fetch_on" in caught.value.remedy


def test_always_fetches_the_blobs_anew(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif(b"content"))
    path = pull.fetch(oras(r))
    path.write_bytes(sif(b"CONTENT"))  # as a broken disk would
    assert pull.fetch(oras(r), "always") == path
    assert path.read_bytes() == sif(b"content")
    assert len(r.seen("/blobs/")) == 2


def test_an_image_that_was_changed_and_removed_by_hand_does_not_come_back(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif(b"content"))
    path = pull.fetch(oras(r))
    with path.open("r+b") as file:  # in place: the layer that it was made of is the same file
        file.seek(45)
        file.write(b"!")
    path.unlink()
    with pytest.raises(ImageError, match="was changed since it was fetched") as caught:
        pull.fetch(oras(r))
    assert "Try again" in caught.value.remedy
    assert not pull.store.list_images()
    assert pull.fetch(oras(r)).read_bytes() == sif(b"content")


def test_never_takes_what_is_there_and_is_otherwise_an_error_that_names_the_store(
    r: Registry, root: Path, pull: Puller
) -> None:
    with pytest.raises(ImageError, match="is not in the store") as caught:
        resolve(oras(r), root, r, "never")
    assert str(root) in caught.value.what
    assert not r.requests
    assert not root.exists()
    r.push_oras("team/app", "1", sif())
    path = pull.fetch(oras(r))
    r.requests.clear()
    assert resolve(oras(r), root, r, "never") == str(path)
    assert not r.requests


@pytest.mark.parametrize("policy", ["missing", "newer", "always"])
def test_an_image_is_resolved_to_a_path(r: Registry, root: Path, policy: PullPolicy) -> None:
    r.push_oras("team/app", "1", sif(b"1"))
    assert Path(resolve(oras(r), root, r, policy)).read_bytes() == sif(b"1")


def test_a_digest_is_fetched_without_asking_what_it_means(r: Registry, pull: Puller) -> None:
    digest = r.push_oras("team/app", "1", sif())
    path = pull.fetch(f"oras://{r.host}/team/app@{digest}")
    assert not r.seen("HEAD")
    assert pull.fetch(oras(r)) == path
    assert len(r.seen("/blobs/")) == 1


# --- the store ---


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize(("store_mode", "file_mode"), [(0o700, 0o600), (0o750, 0o640), (0o755, 0o644)])
def test_who_may_enter_the_store_may_read_what_is_in_it(
    r: Registry, root: Path, pull: Puller, store_mode: int, file_mode: int, umask: int
) -> None:
    root.mkdir()
    root.chmod(store_mode)
    r.push_oras("team/app", "1", sif())
    before = os.umask(umask)
    try:
        path = pull.fetch(oras(r))
    finally:
        os.umask(before)
    files = [path, path.with_suffix(".json"), *pull.store.refs.iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {file_mode}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (root, pull.store.images, pull.store.refs)} == {store_mode}


def test_a_new_store_is_private(r: Registry, root: Path, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif())
    path = pull.fetch(oras(r))
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("policy", ["missing", "never"])
def test_a_store_that_everybody_may_write_is_refused(r: Registry, root: Path, pull: Puller, policy: PullPolicy) -> None:
    r.push_oras("team/app", "1", sif())
    pull.fetch(oras(r))
    root.chmod(0o777)
    with pytest.raises(ImageError, match="can be written by everybody") as caught:
        resolve(oras(r), root, r, policy)
    assert f"chmod o-w {root}" in caught.value.remedy
    with pytest.raises(ImageError, match="can be written by everybody"):
        pull.fetch(oras(r))


def test_a_store_that_can_not_be_made_is_an_error_that_names_it(r: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match=r"The store .*/file/store can't be written"):
        Puller(tmp_path / "file" / "store", r).fetch(oras(r))


@pytest.mark.parametrize("platform", ["arm64", "linux/../x", "Linux/amd64", "linux/amd64/../x", ""])
def test_what_is_no_platform_is_a_config_error(r: Registry, root: Path, platform: str) -> None:
    r.push_oras("team/app", "1", sif())
    with pytest.raises(ConfigError, match="platform") as caught:
        Puller(root, r, platform=platform).fetch(oras(r))
    assert caught.value.option == "platform"


def test_the_working_directory_of_a_dead_process_goes_with_the_next_fetch(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif())
    store: Store = pull.store
    store.prepare()
    with store.working_directory() as mine:
        owner = (mine / "owner").read_text().split()
        dead = store.work / "dead"
        (dead / "tree").mkdir(parents=True)
        (dead / "tree").chmod(0)
        (dead / "owner").write_text(" ".join([*owner[:3], "1", "0"]) + "\n")  # another life of process 1
        elsewhere = store.work / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "owner").write_text(f"n99+0 {' '.join(owner[1:])}\n")
        unmarked = store.work / "unmarked"
        unmarked.mkdir()
        pull.fetch(oras(r))
        assert mine.exists() and elsewhere.exists() and unmarked.exists()
        assert not dead.exists()
        long_ago = elsewhere.stat().st_mtime - 2 * 86400
        os.utime(elsewhere / "owner", (long_ago, long_ago))
        os.utime(unmarked, (long_ago, long_ago))
        assert {folder.name for folder in store.remove_dead_work()} == {"elsewhere", "unmarked"}
    assert not list(store.work.iterdir())
