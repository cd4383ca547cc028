"""What the ends of an interactive session say to each other, and the keys that leave it, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_workspace.cli.local_terminal import EscapeKeys
from hpc_workspace.interactive import frames

DATA_KINDS = (frames.INPUT, frames.STDOUT, frames.STDERR)
FRAMES = st.one_of(
    st.tuples(st.sampled_from(DATA_KINDS), st.binary(min_size=1, max_size=2000)),
    st.tuples(st.just(frames.START), st.binary(min_size=2, max_size=2000)),
    st.tuples(st.just(frames.FAILED), st.binary(max_size=200)),
    st.sampled_from([(kind, b"") for kind in (frames.INPUT_END, frames.PING, frames.PONG, frames.STARTED)]),
    st.builds(lambda rows, columns: (frames.RESIZE, frames.build_size(rows, columns)), st.integers(), st.integers()),
    st.builds(lambda count: (frames.CREDIT, frames.build_count(count)), st.integers(0, 2**32 - 1)),
    st.builds(lambda code: (frames.EXIT, frames.build_code(code)), st.integers(-(2**31), 2**31 - 1)),
    st.builds(lambda number: (frames.SIGNAL, bytes([number])), st.integers(0, 255)),
)
CUTS = st.lists(st.integers(1, 50), min_size=1)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` in pieces of the sizes in `cuts`, over and over."""
    pieces = []
    turn = 0
    while data:
        size = cuts[turn % len(cuts)]
        pieces.append(data[:size])
        data, turn = data[size:], turn + 1
    return pieces


@given(st.lists(FRAMES), CUTS)
def test_frames_come_out_as_they_went_in_whatever_pieces_they_come_in(
    said: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    decoder = frames.Decoder()
    data = b"".join(frames.build_frame(kind, payload) for kind, payload in said)
    assert [frame for piece in pieces_of(data, cuts) for frame in decoder.feed(piece)] == said


@given(st.binary())
def test_whatever_comes_is_frames_or_an_error(data: bytes) -> None:
    try:
        found = frames.Decoder().feed(data)
    except frames.FrameError:
        return
    assert data.startswith(b"".join(frames.build_frame(kind, payload) for kind, payload in found))


@given(st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_a_length_that_no_frame_has_is_refused_before_anything_is_waited_for(kind: int, length: int) -> None:
    head = bytes([kind]) + length.to_bytes(4, "big")
    if length > frames.WINDOW_BYTES or kind not in range(frames.START, frames.EXIT + 1):
        with pytest.raises(frames.FrameError):
            frames.Decoder().feed(head)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_numbers_come_back(code: int, rows: int, columns: int) -> None:
    assert frames.parse_code(frames.build_code(code)) == code
    assert frames.parse_size(frames.build_size(rows, columns)) == (rows, columns)


KEYS = st.text(alphabet="~.x\r\n", max_size=30).map(str.encode)


def typed(pieces: list[bytes]) -> tuple[bytes, bool]:
    """What is passed on of what is typed in these pieces, and whether the person left."""
    escape, passed = EscapeKeys(), b""
    for piece in pieces:
        more, leaves = escape.feed(piece)
        passed += more
        if leaves:
            return passed, True
    return passed, False


@given(KEYS, CUTS)
def test_the_keys_that_leave_are_found_in_whatever_pieces_they_come(keys: bytes, cuts: list[int]) -> None:
    assert typed(pieces_of(keys, cuts)) == typed([keys])


@given(KEYS)
def test_one_leaves_by_a_tilde_and_a_dot_at_the_start_of_a_line_alone(keys: bytes) -> None:
    lines = keys.replace(b"\n", b"\r").split(b"\r")
    assert typed([keys])[1] == any(line.startswith(b"~.") for line in lines)


@given(st.binary().filter(lambda data: b"~" not in data))
def test_what_has_no_tilde_goes_through_as_it_is(data: bytes) -> None:
    assert typed([data]) == (data, False)


@pytest.mark.parametrize(("keys", "passed"), [(b"~~\r", b"~\r"), (b"~x", b"~x"), (b"a~.", b"a~."), (b"\r~~.", b"\r~.")])
def test_a_tilde_that_does_not_leave_is_the_program_s(keys: bytes, passed: bytes) -> None:
    assert typed([keys]) == (passed, False)
