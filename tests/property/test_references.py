"""References: each is read back as it was written, and no two share what the store keeps of them."""

from __future__ import annotations

import time
from pathlib import Path

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hpc_workspace.errors import ConfigError
from hpc_workspace.images.reference import Reference, parse_image
from hpc_workspace.images.store import Store, ref_key

ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyz0123456789"
WORD = st.text(ALPHANUMERIC, min_size=1, max_size=6)
COMPONENT = st.builds(
    lambda first, rest: first + "".join(separator + word for separator, word in rest),
    WORD,
    st.lists(st.tuples(st.sampled_from([".", "_", "__", "-", "---"]), WORD), max_size=2),
)
PORT = st.one_of(st.just(""), st.integers(0, 65535).map(lambda port: f":{port}"))
LABEL = st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,5}[a-zA-Z0-9])?", fullmatch=True)
HOST = st.one_of(
    st.builds(lambda labels, port: ".".join(labels) + port, st.lists(LABEL, min_size=2, max_size=3), PORT),
    st.builds(lambda name, port: f"{name}{port}", st.sampled_from(["localhost", "docker.io", "index.docker.io"]), PORT),
    st.builds(lambda address, port: f"[{address}]{port}", st.ip_addresses(v=6), PORT),
)
TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
VERSION = st.one_of(
    st.just(""),
    TAG.map(lambda tag: f":{tag}"),
    st.binary(min_size=32, max_size=32).map(lambda data: f"@sha256:{data.hex()}"),
    st.builds(lambda tag, data: f":{tag}@sha256:{data.hex()}", TAG, st.binary(min_size=32, max_size=32)),
)
REPOSITORY = st.lists(COMPONENT, min_size=1, max_size=3).map("/".join)
OF_A_REGISTRY = st.builds(
    lambda scheme, host, repository, version: f"{scheme}{host}/{repository}{version}",
    st.sampled_from(["docker://", "oras://"]),
    HOST,
    REPOSITORY,
    VERSION,
)
BARE = st.builds(  # a first part with a dot would be a host
    lambda first, rest, version: f"docker://{'/'.join([first.replace('.', '_'), *rest])}{version}",
    COMPONENT,
    st.lists(COMPONENT, max_size=2),
    VERSION,
)
PATH = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
OF_FILES = st.builds(
    lambda scheme, path: f"{scheme}:{path}", st.sampled_from(["docker-archive", "oci-archive", "oci"]), PATH
)
OTHERS = st.builds(lambda scheme, rest: f"{scheme}://{rest}", st.sampled_from(["library", "http", "https"]), PATH)
IMAGE = st.one_of(OF_A_REGISTRY, BARE, OF_FILES, OTHERS)
PLATFORM = st.sampled_from(["linux/amd64", "linux/arm64", "linux/arm64/v8"])


def parsed(image: str) -> Reference:
    try:
        found = parse_image(image)
    except ConfigError:
        assume(False)  # such as ~nobody
    assert isinstance(found, Reference)
    return found


@settings(deadline=None)
@given(st.one_of(OF_A_REGISTRY, BARE))
def test_every_name_of_the_grammar_is_a_reference(image: str) -> None:
    assert isinstance(parse_image(image), Reference)


@settings(deadline=None)
@given(IMAGE)
@example("docker-archive:////x")
@example("docker-archive://x")
@example("oci:a:b@c")
def test_a_reference_is_read_back_as_it_was_written(image: str) -> None:
    reference = parsed(image)
    assert parse_image(str(reference)) == reference
    assert str(parse_image(str(reference))) == str(reference)


@settings(deadline=None)
@given(st.one_of(OF_A_REGISTRY, BARE))
def test_a_reference_names_host_and_version_in_full(image: str) -> None:
    reference = parsed(image)
    assert reference.registry == reference.registry.lower() != ""
    assert bool(reference.tag) != bool(reference.digest)
    assert str(reference).startswith(f"{reference.scheme}://{reference.registry}/{reference.repository}")


@settings(deadline=None)
@given(st.lists(st.tuples(IMAGE, PLATFORM), min_size=2, max_size=6))
@example([("docker://a/b:c", "linux/amd64"), ("docker://a_b:c", "linux/amd64"), ("docker://a/b_c", "linux/amd64")])
@example([("docker://a/b", "linux/arm64"), ("docker://a/b", "linux/arm64/v8")])
@example([("docker://a.b/c", "linux/amd64"), ("oras://a.b/c", "linux/amd64")])
def test_names_or_platforms_that_differ_never_share_a_file(images: list[tuple[str, str]]) -> None:
    keys = {(parsed(image), platform) for image, platform in images}
    assert len({ref_key(reference, platform) for reference, platform in keys}) == len(keys)
    store = Store(Path("/store"))
    paths = {store.ref_path(reference, platform) for reference, platform in keys}
    assert len(paths) == len(keys)
    assert {path.parent for path in paths} == {store.refs}


@settings(deadline=None)
@given(st.text(max_size=60))
@example("~nobody-of-this-name/x.sif")
@example("docker-archive:~nobody-of-this-name/x")
@example("docker-archive:/\udcff.tar")
@example("docker://[::::]/x")
@example("docker://a.b:99999/x")
@example("")
def test_any_text_is_a_path_a_reference_or_a_config_error(image: str) -> None:
    try:
        found = parse_image(image)
    except ConfigError as error:
        assert error.option == "image"
        return
    assert isinstance(found, Path) or parse_image(str(found)) == found


@settings(deadline=None)
@given(
    st.sampled_from(
        ["", "docker://", "oras://", "docker://a.b/", "docker://a/b:", "docker://a/b@sha256:", "oci:", "~"]
    ),
    st.sampled_from(["a", "a-", "a.", "a__", "-", "_", ".", "/", "a/", ":", "@", "a:", "[:", "1"]),
    st.sampled_from(["", "!", "A", "/x", ":t", "@sha256:0"]),
)
def test_long_names_take_no_long_time_and_make_no_long_error(head: str, middle: str, tail: str) -> None:
    begun = time.thread_time()
    try:
        parse_image(head + middle * (60_000 // len(middle)) + tail)
    except ConfigError as error:
        assert len(str(error)) < 2000
    assert time.thread_time() - begun < 1
