"""A plan: what many images take, before one of them is fetched, without using up what the registry lets us pull."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hpc_workspace.cli.commands import cli
from hpc_workspace.errors import ConfigError
from hpc_workspace.images.plan import Plan, Planned, make_plan, read_references, seconds_at
from hpc_workspace.images.registry import RateLimit
from tests.registry import Fault, Registry
from tests.unit.images.pulling import Puller, oras, sif

HEX = "0" * 64


def docker(r: Registry, name: str) -> str:
    return f"docker://{r.host}/{name}:1"


def push(r: Registry, name: str, *contents: bytes) -> list[int]:
    """An image with a layer for each content. Returns the sizes of its blobs: the configuration first."""
    r.push(name, "1", layers=[{"file": content} for content in contents], platforms=["linux/amd64"])
    manifest = r.manifest(name, r.platforms(name, "1")["linux/amd64"])
    return [manifest["config"]["size"], *(layer["size"] for layer in manifest["layers"])]


def states(plan: Plan) -> dict[str, str]:
    return {image.image: image.state for image in plan.images}


def limited(r: Registry, gets: int, window_s: int = 21600) -> None:
    r.rate_limit = (gets, window_s)


# --- what they take ---


def test_layers_that_images_share_count_once(r: Registry, pull: Puller) -> None:
    config_a, base, a = push(r, "team/a", b"base" * 999, b"a")
    config_b, _, b = push(r, "team/b", b"base" * 999, b"b" * 50)
    plan = make_plan(pull.fetcher, {docker(r, "team/a"): 3, docker(r, "team/b"): 1})
    assert plan.images == (
        Planned(docker(r, "team/a"), "missing", 3, config_a + base + a),
        Planned(docker(r, "team/b"), "missing", 1, config_b + base + b),
    )
    assert plan.download_bytes == config_a + base + a + config_b + b
    assert (plan.rate_limits, plan.wait_s) == ({}, 0)
    assert not r.seen("/blobs/")


def test_what_is_here_takes_nothing_and_asks_nobody(r: Registry, pull: Puller, tmp_path: Path) -> None:
    r.push_oras("team/app", "1", sif())
    pull.fetch(oras(r))
    (tmp_path / "x.sif").write_bytes(sif())
    r.requests.clear()
    plan = make_plan(pull.fetcher, {oras(r): 1, str(tmp_path / "x.sif"): 2, str(tmp_path / "y.sif"): 1})
    assert states(plan) == {oras(r): "here", f"{tmp_path}/x.sif": "here", f"{tmp_path}/y.sif": "error"}
    assert plan.download_bytes == 0
    assert not r.requests


def test_another_name_of_what_is_here_is_here(r: Registry, pull: Puller) -> None:
    for tag in ("1", "2"):
        r.push_oras("team/app", tag, sif())
    pull.fetch(oras(r))
    assert states(make_plan(pull.fetcher, {oras(r, tag="2"): 1})) == {oras(r, tag="2"): "here"}


def test_layers_that_are_here_already_do_not_count(r: Registry, pull: Puller) -> None:
    for name in ("team/a", "team/b"):
        r.push_oras(name, "1", sif(b"shared"))
    pull.fetch(oras(r, "team/a"))
    plan = make_plan(pull.fetcher, {oras(r, "team/b"): 1})
    assert plan.images == (Planned(oras(r, "team/b"), "missing", 1, 0),)


def test_an_image_that_can_not_be_had_is_told_with_its_reason(r: Registry, pull: Puller) -> None:
    push(r, "team/a", b"a")
    r.push("team/arm", "1", files={}, platforms=["linux/arm64"])
    plan = make_plan(pull.fetcher, {docker(r, name): 1 for name in ("team/a", "team/nosuch", "team/arm")})
    assert states(plan) == {
        docker(r, "team/a"): "missing",
        docker(r, "team/arm"): "error",
        docker(r, "team/nosuch"): "error",
    }
    errors = [image.error for image in plan.images]
    assert errors == ["", "It is not for linux/amd64.", f"{r.host} has no team/nosuch:1."]


def test_a_cut_or_a_wrong_manifest_is_one_images_error(r: Registry, pull: Puller) -> None:
    push(r, "team/a", b"a")
    push(r, "team/b", b"b")
    r.faults.append(Fault("cut", match="GET /v2/team/a/", after_bytes=20))
    plan = make_plan(pull.fetcher, {docker(r, "team/a"): 1, docker(r, "team/b"): 1})
    assert list(states(plan).values()) == ["error", "missing"]


def test_what_only_the_runtime_can_fetch_is_of_unknown_size(pull: Puller, tmp_path: Path) -> None:
    plan = make_plan(pull.fetcher, {"library://lolcow": 1, f"docker-archive:{tmp_path}/x.tar": 1})
    assert {(image.state, image.download_bytes) for image in plan.images} == {("missing", None)}


def test_manifests_that_a_plan_asked_for_are_not_pulled_again(r: Registry, pull: Puller) -> None:
    r.push_oras("team/app", "1", sif())
    make_plan(pull.fetcher, {oras(r): 1})
    r.requests.clear()
    pull.fetch(oras(r))
    assert not r.seen("GET /v2/team/app/manifests")


def test_what_is_no_image_is_a_config_error(pull: Puller) -> None:
    with pytest.raises(ConfigError, match="capital letters"):
        make_plan(pull.fetcher, {"Python": 1})


# --- the rate limit ---


@pytest.mark.parametrize(("limit", "asked"), [(1000, 20), (42, 11), (22, 6), (6, 1), (3, 1)])
def test_a_plan_uses_no_more_than_half_of_what_is_left(r: Registry, pull: Puller, limit: int, asked: int) -> None:
    names = [f"team/app{i:02}" for i in range(20)]
    for name in names:
        push(r, name, name.encode())  # an index and a manifest: two pulls each
    limited(r, limit)
    plan = make_plan(pull.fetcher, {docker(r, name): 1 for name in names})
    known = [image for image in plan.images if image.download_bytes is not None]
    assert len(known) <= asked
    assert r.manifest_gets <= 2 + max(0, limit - 2) // 2
    assert {image.state for image in plan.images} == {"missing"}
    assert r.manifest_gets == 2 * len(known)
    told = plan.rate_limits[r.host]
    assert (told.pulls, told.window_s) == (limit, 21600)
    rest = 2 * (20 - len(known)) - (limit - r.manifest_gets)
    assert told.remaining == max(0, limit - r.manifest_gets)
    assert plan.wait_s == pytest.approx(max(0, rest) / limit * 21600)


def test_plans_made_again_and_again_do_not_use_up_the_limit_either(r: Registry, pull: Puller) -> None:
    names = [f"team/app{i}" for i in range(8)]
    for name in names:
        push(r, name, name.encode())
    limited(r, 10)
    for _ in range(5):
        plan = make_plan(pull.fetcher, {docker(r, name): 1 for name in names})
        assert set(states(plan).values()) == {"missing"}
    assert 0 < r.manifest_gets < 10


@pytest.mark.parametrize(
    ("limit", "pulls", "seconds"),
    [
        (RateLimit(100, 21600, 100), 100, 0),
        (RateLimit(100, 21600, 0), 50, 10800),
        (RateLimit(100, 21600, None), 150, 10800),
        (RateLimit(0, 21600, 0), 2, 43200),
    ],
)
def test_the_wait_is_what_the_limit_makes_of_the_rest(limit: RateLimit, pulls: int, seconds: float) -> None:
    assert seconds_at(limit, pulls) == seconds


# --- files ---


def test_a_file_has_one_reference_a_line_or_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_text(
        '# a comment\n\npython:3.12\n  docker://a/b  \n{"id": 1, "image": "python:3.12"}\r\n{"image": "x.sif"}\npython:3.12\n'
    )
    assert read_references(path) == {"python:3.12": 3, "docker://a/b": 1, "x.sif": 1}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'a\n{"image": "b"\n', "line 2, is not JSON"),
        (b'\n\n{"id": 1}\n', 'line 3, has no "image"'),
        (b'{"image": ""}\n', 'line 1, has no "image"'),
        (b'{"image": 5}\n', 'line 1, has no "image"'),
        (b'{"image": ' + b"[" * 100_000, "line 1, is not JSON"),
        (b"\xff\xfe", "can't be read"),
    ],
)
def test_a_line_that_names_no_image_is_named(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=why) as caught:
        read_references(path)
    assert caught.value.option == "FILE"
    assert str(path) in caught.value.what


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read_references(tmp_path / "nosuch")


# --- from a shell ---


def run(path: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["images", "plan", str(path), "--platform", "linux/amd64", *arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


@pytest.fixture
def file(r: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_PLAIN_HTTP", r.host)
    return tmp_path / "images.txt"


def test_a_plan_is_printed_with_sum_and_limit(r: Registry, file: Path) -> None:
    sizes = push(r, "team/a", b"a")
    for i in range(4):
        push(r, f"team/b{i}", b"b")
    limited(r, 4)
    file.write_text("\n".join([docker(r, "team/a")] * 2 + [docker(r, f"team/b{i}") for i in range(4)]))
    result = run(file)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == ["missing", str(sum(sizes)), "B", "2", "x", docker(r, "team/a")]
    assert len(result.stdout.splitlines()) == 5
    assert "0 here, 5 missing, 0 error; " in result.stderr
    assert f"{r.host}: 4 pulls in 6 h, 2 left" in result.stderr
    assert "At that rate the rest takes at least 9.0 h." in result.stderr


def test_a_plan_as_json_has_everything(r: Registry, file: Path) -> None:
    r.push_oras("team/app", "1", sif(b"content"))
    limited(r, 100, 3600)
    file.write_text(json.dumps({"id": "t1", "image": oras(r)}))
    answer: dict[str, Any] = json.loads(run(file, "--json").stdout)
    assert answer == {
        "images": [{"image": oras(r), "state": "missing", "uses": 1, "download_bytes": 48, "error": ""}],
        "download_bytes": 48,
        "rate_limits": {r.host: {"pulls": 100, "window_s": 3600.0, "remaining": 99}},
        "wait_s": 0.0,
    }


def test_a_plan_with_an_image_that_can_not_be_had_exits_1(r: Registry, file: Path) -> None:
    file.write_text(f"{oras(r, 'team/nosuch')}\n")
    result = run(file)
    assert result.exit_code == 1
    assert result.stdout.startswith("error")
    assert "has no team/nosuch:1" in result.stdout
