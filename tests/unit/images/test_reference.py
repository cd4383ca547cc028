"""References: what is a name of a registry's image, what is a path, and what is neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_workspace.errors import ConfigError
from hpc_workspace.images.reference import Reference, parse_image

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("image", "written"),
    [
        ("python", "docker://docker.io/library/python:latest"),
        ("python:3.12", "docker://docker.io/library/python:3.12"),
        ("docker://python:3.12", "docker://docker.io/library/python:3.12"),
        ("team/app", "docker://docker.io/team/app:latest"),
        ("docker.io/python", "docker://docker.io/library/python:latest"),
        ("index.docker.io/library/python", "docker://docker.io/library/python:latest"),
        ("registry-1.docker.io/python:3", "docker://docker.io/library/python:3"),
        ("ghcr.io/a/b_c:V1", "docker://ghcr.io/a/b_c:V1"),
        ("GHCR.io/a/b", "docker://ghcr.io/a/b:latest"),
        ("localhost/a", "docker://localhost/a:latest"),
        ("node:5000/a/b:c", "docker://node:5000/a/b:c"),
        ("docker://127.0.0.1:5000/a", "docker://127.0.0.1:5000/a:latest"),
        ("docker://[::1]:5000/a", "docker://[::1]:5000/a:latest"),
        ("docker:python", "docker://docker.io/library/docker:python"),  # a repository of that name
        (f"a@sha256:{HEX}", f"docker://docker.io/library/a@sha256:{HEX}"),
        (f"ghcr.io/a/b:1@sha256:{HEX}", f"docker://ghcr.io/a/b@sha256:{HEX}"),  # the tag beside a digest says nothing
        ("oras://x.org/y", "oras://x.org/y:latest"),
        ("library://lolcow", "library://lolcow"),
        ("library://a/b/c:1", "library://a/b/c:1"),
        ("https://x.org/a.sif", "https://x.org/a.sif"),
        ("docker-archive:/a/b,c:d.tar", "docker-archive:/a/b,c:d.tar"),
        ("oci-archive:///a/b", "oci-archive:/a/b"),
        ("oci:/a", "oci:/a"),
    ],
)
def test_a_reference_has_one_form(image: str, written: str) -> None:
    reference = parse_image(image)
    assert isinstance(reference, Reference)
    assert str(reference) == written


@pytest.mark.parametrize("image", ["/a", "./a", "../a", "~/a", "a.sif", "dir/a.sif", "/a:b@c", "~/x.sif"])
def test_what_looks_like_a_path_is_one(image: str) -> None:
    assert parse_image(image) == Path(image).expanduser().absolute()


def test_a_name_is_a_path_where_a_file_or_sandbox_of_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(parse_image("python"), Reference)
    (tmp_path / "python").mkdir()
    assert isinstance(parse_image("python"), Reference)  # any directory is no image
    (tmp_path / "python" / ".singularity.d").mkdir()
    (tmp_path / "other").write_bytes(b"")
    assert parse_image("python") == tmp_path / "python"
    assert parse_image("other") == tmp_path / "other"
    assert isinstance(parse_image("docker://python"), Reference)


def test_a_file_here_may_be_named_from_here_or_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert str(parse_image("docker-archive:x.tar")) == f"docker-archive:{tmp_path}/x.tar"
    assert str(parse_image("docker-archive:~/x.tar")) == f"docker-archive:{tmp_path}/home/x.tar"


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("", "no repository"),
        ("Python", "capital letters"),
        ("ghcr.io/Team/app", "capital letters"),
        ("a:", "'' is not a tag"),
        ("a:.b", "is not a tag"),
        ("a:" + "t" * 129, "is not a tag"),
        ("a:b:c", "is not a tag"),
        ("a b", "no repository"),
        ("a//b", "no repository"),
        ("a/-b", "no repository"),
        ("a\nb", "control character"),
        ("python\x7f", "control character"),
        ("docker-archive:/\udcff", "not UTF-8"),
        ("ftp://a/b", "no scheme 'ftp'"),
        ("docker-daemon://a:b", "no scheme 'docker-daemon'"),
        ("docker://", "no repository"),
        ("oras://a", "names no registry"),
        ("oci:", "nothing follows"),
        ("library://", "nothing follows"),
        ("a@sha256:12", "what follows the @"),
        (f"a@md5:{HEX[:32]}", "what follows the @"),
        (f"a@sha256:{HEX.upper()}", "what follows the @"),
        ("-a.org/x", "not a host"),
        ("a.org:/x", "not a host"),
        ("a.org:65536/x", "not a host"),
        ("[::::]/x", "not a host"),
        ("user:secret@a.org/x", "what follows the @"),
        ("~nobody-of-this-name/x", "no such home directory"),
    ],
)
def test_what_is_malformed_is_a_config_error_that_says_why(image: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        parse_image(image)
    assert caught.value.option == "image"
    assert caught.value.remedy
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
