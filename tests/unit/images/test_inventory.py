"""The store from a shell: what is listed, what `verify` finds, and what `prune` removes and leaves alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hpc_workspace import claims
from hpc_workspace.cli.commands import cli
from hpc_workspace.errors import ConfigError, ImageError
from hpc_workspace.images.inventory import list_images, prune, require_named
from hpc_workspace.images.store import Store
from hpc_workspace.owner import Owner
from hpc_workspace.rendezvous import WorkspaceDirectory
from hpc_workspace.toolbox import toolbox_path
from tests.registry import Registry
from tests.unit.images.pulling import Puller, at_once, big, executable, oras, sif
from tests.unit.test_rendezvous import make_record, make_spec

ME = Owner.of(os.getpid())
DEAD = Owner(ME.node, ME.boot_id, ME.pid_namespace, 1, 0)
DAY_S = 86400


def run(*arguments: str, code: int = 0) -> Result:
    """`hpc-workspace images ARGUMENTS…`, which must exit so."""
    result = CliRunner().invoke(cli, ["images", *arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def image(r: Registry, pull: Puller) -> Path:
    """An image of the store, with the layer it was made of."""
    r.push_oras("team/app", "1", sif(b"content"))
    return pull.fetch(oras(r))


@pytest.fixture
def store(root: Path) -> Store:
    store = Store(root)
    store.prepare()
    return store


def make_older(path: Path, by_s: float) -> None:
    then = time.time() - by_s
    os.utime(path, (then, then))


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """All that is in a directory, and when it was last changed."""
    return {
        str(p.relative_to(root)): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in root.rglob("*") if p.is_file()
    }


def prune_all(store: Store, **changes: Any) -> list[str]:
    """The names of what `prune` removed."""
    options: dict[str, Any] = {"unused_for_s": None, "in_use": (), "keep_toolbox": None, "dry_run": False}
    pruned = prune(store, **options | changes)
    assert not pruned.left
    return sorted(str(path.relative_to(store.root)) for path, _ in pruned.removed)


# --- ls ---


def test_a_store_that_is_not_there_is_empty(root: Path) -> None:
    assert run("ls").stderr == "0 images, 0 B\n"
    assert run_json("ls") == []
    assert run_json("verify") == []
    assert run_json("prune", "--all") == {"removed": [], "left": [], "dry_run": False}
    assert not root.exists()


def test_every_name_of_an_image_is_listed_with_its_size(r: Registry, pull: Puller, image: Path) -> None:
    r.push_oras("team/app", "2", sif(b"content"))
    pull.fetch(oras(r, tag="2"))
    lines = run("ls").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [oras(r, tag="1"), oras(r, tag="2")]
    assert all(line.split()[1:] == [image.name[:12], "linux/amd64", "48", "B"] for line in lines)
    assert run("ls").stderr == "1 images, 48 B\n"


def test_what_is_listed_as_json_has_everything(r: Registry, image: Path) -> None:
    (listed,) = run_json("ls")
    assert listed | {"fetched_at": 0, "unused_s": 0} == {
        "path": str(image),
        "names": [oras(r)],
        "digest": f"sha256:{image.name[:64]}",
        "platform": "linux/amd64",
        "size_bytes": 48,
        "fetched_at": 0,
        "unused_s": 0,
    }
    assert abs(listed["fetched_at"] - time.time()) < 60


def test_an_image_is_listed_whatever_was_lost_about_it(r: Registry, store: Store, image: Path) -> None:
    make_older(image, 40 * DAY_S)
    for path in (*store.refs.iterdir(), image.with_suffix(".json")):
        path.write_text('{"reference": "docker://x", "platform": "../..", "digest": "sha256:.."}')
    (line,) = run("ls").stdout.splitlines()
    assert line.split() == ["(no", "name)", "-" * 12, "48", "B", "unused", "for", "40", "d"]
    assert run_json("verify", code=1)[0]["wrong"] == "nothing is known of it"


def test_another_store_can_be_named(r: Registry, tmp_path: Path, image: Path) -> None:
    assert run_json("ls", "--store", str(tmp_path / "other")) == []
    assert len(run_json("ls", "--store", str(image.parents[1]))) == 1


def test_images_are_named_by_reference_or_digest(r: Registry, store: Store, image: Path) -> None:
    listed = list_images(store)
    for name in (oras(r), image.name[:64], f"sha256:{image.name[:12]}", image.name[:6]):
        assert require_named(listed, [name]) == listed
    assert require_named(listed, []) == listed
    for name in ("docker://other", image.name[:5], "", "sha256:"):
        with pytest.raises(ImageError, match="There is no image"):
            require_named(listed, [name])


# --- verify ---


def test_verify_finds_nothing_wrong_with_what_was_fetched(r: Registry, image: Path) -> None:
    assert run("verify").stdout == f"good  {oras(r)}\n"
    assert run_json("verify") == [{"path": str(image), "name": oras(r), "wrong": ""}]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def unlink_facts(path: Path) -> None:
    path.with_suffix(".json").unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_directory(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.mkdir()
    facts = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(facts | {"size_bytes": path.stat().st_size or size}))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (flip, "its content was changed"),
        (cut_short, "it has 47 bytes and should have 48"),
        (unlink_facts, "nothing is known of it"),
        (replace_by_directory, "it can't be read: Is a directory"),
    ],
)
def test_verify_finds_what_was_changed_says_what_to_do_and_exits_1(
    r: Registry, image: Path, harm: Any, why: str
) -> None:
    harm(image)
    result = run("verify", code=1)
    assert result.stdout == f"BAD   {oras(r)}  {why}\n"
    assert "To have it anew: " in result.stderr
    assert run_json("verify", code=1)[0]["wrong"] == why


def test_what_verify_advises_mends_it(r: Registry, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_PLAIN_HTTP", r.host)
    flip(image)
    advice = run("verify", code=1).stderr.partition("To have it anew: hpc-workspace images ")[2].split()
    run(*advice, "--platform", "linux/amd64")
    assert run("verify").stdout == f"good  {oras(r)}\n"
    assert image.read_bytes() == sif(b"content")


def test_verify_looks_at_toolboxes_too(store: Store) -> None:
    folder = store.root / "toolbox-3.11.0-0123456789ab"
    folder.mkdir()
    (checked,) = run_json("verify", code=1)
    assert checked["path"] == str(folder)
    assert "toolbox.json is missing" in checked["wrong"]
    assert f"rm -r {folder}" in run("verify", code=1).stderr


def test_verify_refuses_a_store_that_everybody_may_write(root: Path, image: Path) -> None:
    root.chmod(0o777)
    with pytest.raises(ImageError, match="written by everybody"):
        run("verify")


# --- prune ---


def test_prune_removes_layers_and_leaves_images(r: Registry, root: Path, pull: Puller, image: Path) -> None:
    result = run("prune")
    assert not list(pull.store.layers.iterdir())
    assert image.read_bytes() == sif(b"content")
    assert {line.split()[0] for line in result.stdout.splitlines()} == {"removed"}
    assert result.stderr.endswith("freed\n")
    assert len(pull.store.list_refs()) == 1
    r.requests.clear()
    assert pull.fetch(oras(r)) == image
    assert not r.requests


def test_prune_removes_what_killed_processes_left(store: Store, image: Path) -> None:
    (store.layers / ("0" * 64 + ".part")).write_bytes(b"half")
    (store.layers / f".{'0' * 64}-abc").write_bytes(b"half")
    for name, owner in {"dead": DEAD, "mine": ME}.items():
        (store.work / name / "tree").mkdir(parents=True)
        (store.work / name / "owner").write_text(f"{owner}\n")
    (store.claims / "layer-x.1").write_text(f"{DEAD}\nn\n")
    prune_all(store)
    assert not list(store.layers.iterdir())
    assert [folder.name for folder in store.work.iterdir()] == ["mine"]
    assert not list(store.claims.iterdir())


def test_prune_removes_names_and_facts_without_an_image(store: Store, image: Path) -> None:
    facts = image.with_suffix(".json")
    image.unlink()
    assert prune_all(store)[-1].startswith("refs/")
    assert facts.exists()  # somebody may be about to put its image in place
    make_older(facts, 2 * DAY_S)
    assert prune_all(store) == [f"images/{facts.name}"]


def test_prune_removes_an_image_that_no_name_means_after_a_day(r: Registry, pull: Puller, image: Path) -> None:
    r.push_oras("team/app", "1", sif(b"new"))
    new = pull.fetch(oras(r), "newer")
    prune_all(pull.store)
    assert image.exists()
    make_older(image, 2 * DAY_S)
    make_older(new, 2 * DAY_S)
    assert prune_all(pull.store) == sorted([f"images/{image.name}", f"images/{image.stem}.json"])
    assert new.exists()


def test_prune_removes_images_that_nobody_has_used_for_so_long(r: Registry, pull: Puller, image: Path) -> None:
    r.push_oras("team/other", "1", sif(b"other"))
    other = pull.fetch(oras(r, "team/other"))
    make_older(image, 31 * DAY_S)
    make_older(other, 29 * DAY_S)
    run("prune", "--unused-for", "30d")
    assert not image.exists()
    assert other.exists()
    assert [ref.reference for ref in pull.store.list_refs()] == [oras(r, "team/other")]


def test_an_image_that_is_taken_counts_as_used(r: Registry, root: Path, pull: Puller, image: Path) -> None:
    make_older(image, 40 * DAY_S)
    run("pull", oras(r), "--platform", "linux/amd64")
    assert time.time() - image.stat().st_mtime < DAY_S
    run("prune", "--unused-for", "30d")
    assert image.exists()


def test_prune_all_removes_all_but_what_living_workspaces_use(r: Registry, pull: Puller, image: Path) -> None:
    kept = []
    for name in ("starting", "ready", "ended"):
        r.push_oras(f"team/{name}", "1", sif(name.encode()))
        kept.append(pull.fetch(oras(r, f"team/{name}")))
        spec = make_spec(f"ws-{name}").model_copy(update={"image": str(kept[-1])})
        directory = WorkspaceDirectory.create(spec, "token", {})
        if name != "starting":
            directory.publish(make_record(workspace_id=f"ws-{name}", state=name))
    run("prune", "--all")
    assert pull.store.list_images() == sorted(kept[:2])
    assert len(pull.store.list_refs()) == 2
    assert not image.exists()


def test_a_used_image_is_spared_under_any_name(store: Store, image: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.root)
    assert not prune_all(store, unused_for_s=0, in_use=[tmp_path / "link" / "images" / image.name])[0].startswith(
        "images"
    )
    assert image.exists()


def test_a_dry_run_says_the_same_and_removes_nothing(store: Store, image: Path) -> None:
    (store.claims / "layer-x.1").write_text(f"{DEAD}\nn\n")
    (store.work / "dead").mkdir()
    (store.work / "dead" / "owner").write_text(f"{DEAD}\n")
    old = store.root / "toolbox-3.0.0-0123456789ab"
    old.mkdir()
    make_older(old, 3 * DAY_S)
    before = tree(store.root)
    said = run_json("prune", "--all", "--dry-run")
    assert tree(store.root) == before
    assert old.is_dir()
    assert said["dry_run"]
    assert "would remove" in run("prune", "--all", "--dry-run").stdout
    done = run_json("prune", "--all")
    removed = [[entry["path"] for entry in answer["removed"]] for answer in (said, done)]
    assert removed[0][:-1] == removed[1][:-1]  # the toolbox was renamed before it was removed
    assert not store.list_images()
    assert not old.exists()


@pytest.mark.parametrize("name", ["ref-x", "image-x", "layer-x", "job-x"])
def test_no_layer_is_removed_while_anybody_fetches(store: Store, image: Path, name: str) -> None:
    before = sorted(store.layers.iterdir())
    (store.layers / "half.part").write_bytes(b"x")
    claim = claims.take(store.claims, name)
    assert claim is not None
    try:
        assert prune_all(store, unused_for_s=None) == []
        assert sorted(store.layers.iterdir()) == [*before, store.layers / "half.part"]
        assert claims.is_held(store.claims, name)
    finally:
        claim.close()
    assert len(prune_all(store)) == len(before) + 1


def test_no_image_is_removed_while_it_is_fetched_anew(store: Store, image: Path) -> None:
    claim = claims.take(store.claims, f"image-{image.stem}")
    assert claim is not None
    try:
        prune_all(store, unused_for_s=0)
        assert image.exists() and image.with_suffix(".json").exists()
        assert len(store.list_refs()) == 1
    finally:
        claim.close()
    prune_all(store, unused_for_s=0)
    assert not image.exists()


def test_prunes_and_fetches_at_once_do_each_other_no_harm(r: Registry, root: Path) -> None:
    names = [f"team/app{i}" for i in range(6)]
    for name in names:
        r.push_oras(name, "1", sif(b"shared"))
    fetching = at_once([lambda n=n: [Puller(root, r).fetch(oras(r, n), "always") for _ in range(4)] for n in names])
    pruning = at_once([lambda: [prune_all(Store(root)) for _ in range(30)]] * 2)
    for paths in fetching.join():
        assert isinstance(paths, list), paths
        assert {path.read_bytes() for path in paths} == {sif(b"shared")}
    assert all(isinstance(result, list) for result in pruning.join()), pruning


def test_only_old_toolboxes_of_other_versions_are_removed(root: Path, store: Store) -> None:
    mine = toolbox_path(root)
    used = root / "toolbox-3.1.0-0123456789ab"
    old = root / "toolbox-3.2.0-0123456789ab"
    living = root / "toolbox-3.3.0-0123456789ab"
    half = root / ".toolbox-3.4.0-0123456789ab.abc.part"
    young_half = root / ".toolbox-3.5.0-0123456789ab.abc.part"
    for folder in (mine, used, old, living, half, young_half):
        folder.mkdir()
        (folder / "toolbox.json").write_text("{}")
        (folder / "file").write_bytes(b"x" * 1000)
        if folder not in (used, young_half):
            make_older(folder / "toolbox.json", 3 * DAY_S)
            make_older(folder, 3 * DAY_S)
    WorkspaceDirectory.create(make_spec().model_copy(update={"toolbox": str(living)}), "token", {})
    answer = run_json("prune")
    assert [entry["size_bytes"] for entry in answer["removed"]] == [1002, 1002]
    assert {path for path in root.iterdir() if "toolbox" in path.name} == {mine, used, living, young_half}


def test_something_else_in_the_stores_directory_is_left_alone(root: Path, store: Store, image: Path) -> None:
    (root / "notes.txt").write_text("mine")
    (root / "toolbox-notes").mkdir()
    make_older(root / "toolbox-notes", 30 * DAY_S)
    run("prune", "--all")
    assert (root / "notes.txt").exists() and (root / "toolbox-notes").exists()


def test_a_time_that_is_none_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="--unused-for 'soon' is not a duration") as caught:
        run("prune", "--unused-for", "soon")
    assert caught.value.option == "unused_for"


# --- pull ---


def test_pull_prints_where_images_are(r: Registry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_PLAIN_HTTP", r.host)
    r.push_oras("team/app", "1", big(5_000_000))
    result = run("pull", oras(r), "--platform", "linux/amd64")
    path = Path(result.stdout.strip())
    assert path.read_bytes() == big(5_000_000)
    assert f"{oras(r)}: asking {r.host}\n{oras(r)}: downloading 5.0 MB\n" in result.stderr
    assert run_json("pull", oras(r), "--platform", "linux/amd64") == {oras(r): str(path)}


def test_an_image_that_can_not_be_had_does_not_keep_the_others_back(
    r: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_IMAGES_PLAIN_HTTP", r.host)
    executable(tmp_path / "bin" / "x", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no apptainer
    r.push("team/layers", "1", files={"a": b"b"})
    r.push_oras("team/app", "1", sif())
    wanted = [oras(r, "team/nosuch"), "Malformed", f"docker://{r.host}/team/layers:1", oras(r)]
    result = CliRunner().invoke(cli, ["images", "pull", "--platform", "linux/amd64", *wanted])
    assert Path(result.stdout.strip()).read_bytes() == sif()
    assert "has no team/nosuch:1" in result.stderr
    assert "capital letters" in result.stderr
    assert "Apptainer is not available" in str(result.exception)
