"""What becomes a SIF through the runtime: once, within bounds, and ended with who asked for it.

The runtime is an executable on PATH that says what it was told; real conversions are the cluster's matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from hpc_workspace import procfs
from hpc_workspace.config import ImageSettings
from hpc_workspace.errors import ImageError, PrerequisiteError
from hpc_workspace.images.archives import digest_of_archive
from hpc_workspace.images.convert import Limits
from tests.registry import Registry
from tests.unit.images.pulling import FetchingProcess, Puller, at_once, executable, named, oras
from tests.unit.server.running import eventually

# Writes a line for each call, its environment, and a SIF that holds what it was given.
APPTAINER = """#!/bin/sh
here=$(dirname "$0")
case "$*" in *--help*) echo "  --mksquashfs-args string   Arguments"; exit 0;; esac
echo "$@" >> "$here/calls"
env | sort > "$here/environment"
for word; do target=$source; source=$word; done
if [ -e "$here/hangs" ]; then echo $$ > "$here/pid"; sleep 600; fi
if [ -e "$here/says" ]; then cat "$here/says"; exit 255; fi
{
    printf '%32s' ''; printf SIF_MAGIC
    case "$source" in
        oci:*) cat "${source#oci:}"/oci-layout "${source#oci:}"/index.json; ls "${source#oci:}"/blobs/sha256;;
        docker-archive:*|oci-archive:*) cat "${source#*:}";;
        *) echo "$source";;
    esac
} > "$target"
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of an `apptainer` that is on PATH."""
    folder = tmp_path / "bin"
    executable(folder / "apptainer", APPTAINER)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def calls(runtime: Path) -> list[list[str]]:
    path = runtime / "calls"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def docker(r: Registry, name: str = "team/app") -> str:
    return f"docker://{r.host}/{name}:1"


def push(r: Registry, name: str = "team/app", *contents: bytes, platform: str = "linux/amd64") -> None:
    r.push(name, "1", layers=[{"file": content} for content in contents or (b"x",)], platform=platform)


def test_the_runtime_is_given_a_layout_of_the_image(r: Registry, pull: Puller, runtime: Path) -> None:
    push(r, "team/app", b"1", b"2", b"2")
    said = pull.fetch(docker(r)).read_bytes()[41:].decode()
    index, _, names = said.partition('{"imageLayoutVersion": "1.0.0"}')[2].partition("]}")
    digest = r.content.manifests["team/app", "1"]
    (entry,) = json.loads(index + "]}")["manifests"]
    assert entry["size"] == len(digest[1])
    assert entry["mediaType"] == digest[0]
    manifest = r.manifest("team/app", "1")
    blobs = {entry["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])}
    assert {f"sha256:{name}" for name in names.split()} == blobs
    assert not list(pull.store.work.iterdir())


def test_a_conversion_is_kept_within_bounds(r: Registry, pull: Puller, runtime: Path) -> None:
    push(r)
    pull.fetch(docker(r))
    cpus = min(2, len(os.sched_getaffinity(0)))
    (argv,) = calls(runtime)
    assert argv == [
        "build", "--disable-cache", "--mksquashfs-args", "-processors", str(cpus), "-mem", "1G", "image.sif", "oci:layout",
    ]  # fmt: skip


def test_the_runtime_sees_no_login_and_no_cache_of_the_users(
    r: Registry, pull: Puller, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPTAINER_DOCKER_USERNAME", "ada")
    monkeypatch.setenv("APPTAINER_DOCKER_PASSWORD", "s3cret")
    monkeypatch.setenv("APPTAINER_BINDPATH", "/")
    push(r)
    pull.fetch(docker(r))
    lines = (runtime / "environment").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if "=" in line)
    assert environment["APPTAINER_CACHEDIR"].startswith(str(pull.store.work))
    assert environment["APPTAINER_TMPDIR"].startswith(str(pull.store.work))
    assert not {"APPTAINER_DOCKER_USERNAME", "APPTAINER_DOCKER_PASSWORD", "APPTAINER_BINDPATH"} & set(environment)


def test_many_who_ask_at_once_convert_it_once(r: Registry, runtime: Path, root: Path) -> None:
    push(r, "team/app", b"1", b"2")
    results = at_once([lambda: Puller(root, r).fetch(docker(r))] * 8).join()
    assert len(set(results)) == 1
    assert len(calls(runtime)) == 1
    assert len(r.seen("/blobs/")) == 3


def test_images_that_share_layers_fetch_them_once(r: Registry, runtime: Path, root: Path) -> None:
    for name in ("team/a", "team/b", "team/c"):
        push(r, name, b"base" * 9999, name.encode())
    fetch = [lambda n=n: Puller(root, r).fetch(docker(r, n)) for n in ("team/a", "team/b", "team/c")]
    assert len(set(at_once(fetch).join())) == 3
    shared = r.manifest("team/a", "1")["layers"][0]["digest"]
    assert len(r.seen(shared)) == 1
    assert len(r.seen("/blobs/")) == 7


def test_an_image_that_says_it_is_for_another_machine_is_refused(r: Registry, pull: Puller, runtime: Path) -> None:
    push(r, platform="linux/s390x")
    with pytest.raises(ImageError, match="not for linux/amd64") as caught:
        pull.fetch(docker(r))
    assert caught.value.evidence == "It is for: linux/s390x."
    assert not calls(runtime)
    assert not list(pull.store.work.iterdir())


def test_an_image_for_the_variant_that_is_wanted_is_taken(r: Registry, root: Path, runtime: Path) -> None:
    push(r, platform="linux/arm64/v8")
    assert Puller(root, r, platform="linux/arm64/v8").fetch(docker(r)).name.endswith("-linux-arm64-v8.sif")


def test_without_a_runtime_nothing_is_downloaded(
    r: Registry, pull: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(r)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrerequisiteError, match="Apptainer is not available"):
        pull.fetch(docker(r))
    assert not r.seen("/blobs/")


def test_what_the_runtime_says_of_a_failure_is_told(r: Registry, pull: Puller, runtime: Path) -> None:
    push(r)
    (runtime / "says").write_text("INFO:    Starting build...\n" * 99 + "\x1b[31mFATAL:   no good\x1b[0m\nafter\n")
    with pytest.raises(ImageError, match=r"apptainer can't convert it \(exit code 255\)") as caught:
        pull.fetch(docker(r))
    assert caught.value.evidence == "FATAL:   no good"
    assert not list(pull.store.work.iterdir())
    assert not pull.store.list_images()
    (runtime / "says").unlink()
    r.requests.clear()
    pull.fetch(docker(r))
    assert not r.seen("/blobs/")


def test_a_disk_that_is_full_is_told_with_what_makes_room(r: Registry, pull: Puller, runtime: Path) -> None:
    push(r)
    (runtime / "says").write_text("FATAL: write /x: No space left on device\n")
    with pytest.raises(ImageError) as caught:
        pull.fetch(docker(r))
    assert "images prune" in caught.value.remedy


def test_what_the_runtime_makes_must_be_a_sif(r: Registry, pull: Puller, runtime: Path) -> None:
    push(r)
    executable(
        runtime / "apptainer",
        '#!/bin/sh\n[ "$2" = --help ] && exit\nfor word; do target=$source; source=$word; done\necho no > $target\n',
    )
    with pytest.raises(ImageError, match="is not a SIF file"):
        pull.fetch(docker(r))
    assert not pull.store.list_images()


def test_a_conversion_ends_with_the_process_that_was_killed_and_is_made_again(
    r: Registry, root: Path, pull: Puller, runtime: Path
) -> None:
    push(r)
    (runtime / "hangs").touch()
    process = FetchingProcess(root, r, docker(r))
    process.go()
    eventually(lambda: (runtime / "pid").exists() and (runtime / "pid").read_text().endswith("\n"))
    pid = int((runtime / "pid").read_text())
    process.kill()
    eventually(lambda: procfs.read_process(pid) is None)
    assert len(list(pull.store.work.iterdir())) == 1
    (runtime / "hangs").unlink()
    r.requests.clear()
    assert pull.fetch(docker(r)).exists()
    assert not r.seen("/blobs/")
    assert not list(pull.store.work.iterdir())


def test_what_only_the_runtime_can_fetch_is_fetched_by_it(pull: Puller, runtime: Path) -> None:
    path = pull.fetch("library://team/app:1")
    assert calls(runtime) == [["pull", "--disable-cache", "--arch", "amd64", "image.sif", "library://team/app:1"]]
    assert path.name.startswith(hashlib.sha256(path.read_bytes()).hexdigest())
    assert pull.fetch("library://team/app:1") == path
    assert len(calls(runtime)) == 1
    assert pull.fetch("library://team/app:1", "newer") == path
    assert len(calls(runtime)) == 2


# --- archives ---


def save(path: Path, config: bytes = b"{}", images: int = 1) -> str:
    """An archive as docker-save(1) makes it. Returns its image's digest."""
    listed = json.dumps([{"Config": "c.json", "Layers": []}] * images).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in {"c.json": config, "manifest.json": listed}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return f"sha256:{hashlib.sha256(config).hexdigest()}"


def lay_out(path: Path, digest: str = "sha256:" + "1" * 64, images: int = 1) -> None:
    path.mkdir()
    (path / "index.json").write_text(json.dumps({"manifests": [{"digest": digest}] * images}))


def test_an_archive_is_known_by_its_content(pull: Puller, runtime: Path, tmp_path: Path) -> None:
    digest = save(tmp_path / "a,b:c.tar", b'{"a": 1}')
    path = pull.fetch(f"docker-archive:{tmp_path}/a,b:c.tar")
    assert path.name.startswith(digest.removeprefix("sha256:"))
    assert calls(runtime)[0][-1] == "docker-archive:source"
    (tmp_path / "a,b:c.tar").rename(tmp_path / "other.tar")
    assert pull.fetch(f"docker-archive:{tmp_path}/other.tar") == path
    assert len(calls(runtime)) == 1
    save(tmp_path / "other.tar", b'{"a": 2}')
    assert pull.fetch(f"docker-archive:{tmp_path}/other.tar") != path
    assert len(calls(runtime)) == 2


def test_a_layout_is_known_by_its_manifest(tmp_path: Path) -> None:
    lay_out(tmp_path / "layout")
    assert digest_of_archive(named(f"oci:{tmp_path}/layout")) == "sha256:" + "1" * 64
    with tarfile.open(tmp_path / "layout.tar", "w") as tar:
        tar.add(tmp_path / "layout" / "index.json", "index.json")
    assert digest_of_archive(named(f"oci-archive:{tmp_path}/layout.tar")) == "sha256:" + "1" * 64


def make_nothing(path: Path) -> None:
    pass


def make_text(path: Path) -> None:
    path.write_text("no archive")


def make_empty(path: Path) -> None:
    tarfile.open(path, "w").close()


def make_two(path: Path) -> None:
    save(path, images=2)


def make_deep(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo("manifest.json")
        entry.size = 100_000
        tar.addfile(entry, io.BytesIO(b"[" * 100_000))


def make_link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo("manifest.json")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (make_nothing, "is not there"),
        (make_text, "holds no image that can be read"),
        (make_empty, "holds no image that can be read"),
        (make_two, "holds 2 images"),
        (make_deep, "holds no image that can be read"),
        (make_link, "holds no image that can be read"),
        (Path.mkdir, "holds no image that can be read"),
    ],
)
def test_an_archive_without_one_image_is_an_error(
    pull: Puller, runtime: Path, tmp_path: Path, make: object, why: str
) -> None:
    assert callable(make)
    make(tmp_path / "x.tar")
    with pytest.raises(ImageError, match=why) as caught:
        pull.fetch(f"docker-archive:{tmp_path}/x.tar")
    assert f"docker-archive:{tmp_path}/x.tar" in str(caught.value)
    assert not calls(runtime)


@pytest.mark.parametrize("digest", ["sha512:" + "1" * 128, "sha256:../x", ""])
def test_a_layout_whose_manifest_has_no_digest_is_an_error(tmp_path: Path, digest: str) -> None:
    lay_out(tmp_path / "layout", digest)
    with pytest.raises(ImageError, match="holds no image that can be read"):
        digest_of_archive(named(f"oci:{tmp_path}/layout"))


# --- bounds ---


@pytest.mark.parametrize(
    ("settings", "environment", "cpus", "memory"),
    [
        (ImageSettings(), {}, min(2, len(os.sched_getaffinity(0))), "1G"),
        (ImageSettings(convert_cpus=7, convert_memory="3g"), {}, 7, "3G"),
        (ImageSettings(), {"SLURM_JOB_ID": "1"}, len(os.sched_getaffinity(0)), "1G"),
        (ImageSettings(), {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "8000"}, len(os.sched_getaffinity(0)), "4000M"),
        (
            ImageSettings(convert_cpus=1),
            {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "1000", "SLURM_CPUS_ON_NODE": "6"},
            1,
            "3000M",
        ),
        (ImageSettings(convert_cpus=1), {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "0"}, 1, "1G"),
        (ImageSettings(convert_cpus=1), {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "100"}, 1, "128M"),
    ],
)
def test_a_conversion_may_use_its_job_or_little(
    settings: ImageSettings, environment: dict[str, str], cpus: int, memory: str
) -> None:
    limits = Limits(settings, environment)
    assert (limits.cpus, limits.memory) == (cpus, memory)


def test_a_sif_from_a_registry_needs_no_runtime(
    r: Registry, pull: Puller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r.push_oras("team/app", "1", bytes(32) + b"SIF_MAGIC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pull.fetch(oras(r)).exists()
