"""The multiplexer: whatever the pieces, the order and the sizes, every byte arrives once, in order, on its own stream."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_workspace.mux import frames, session
from hpc_workspace.mux.frames import Decoder, MuxError, MuxGreetingError, MuxProtocolError
from hpc_workspace.mux.session import Channel, Session
from hpc_workspace.mux.streams import Mux
from hpc_workspace.node.bridge import Bridge
from tests.listeners import Listeners

NUMBERS = st.integers(1, frames.STREAM_MAX)
FRAMES = st.one_of(
    st.tuples(st.sampled_from([frames.OPENED, frames.EOF]), NUMBERS, st.just(b"")),
    st.tuples(st.sampled_from([frames.PING, frames.PONG]), st.just(0), st.just(b"")),
    st.tuples(st.sampled_from([frames.REFUSED, frames.RESET]), NUMBERS, st.binary(max_size=60)),
    st.tuples(st.sampled_from([frames.OPEN, frames.DATA]), NUMBERS, st.binary(min_size=1, max_size=300)),
    st.tuples(st.just(frames.WINDOW), NUMBERS, st.binary(min_size=4, max_size=4)),
)
CUTS = st.lists(st.integers(1, 400), max_size=60)
NOISE = st.binary(max_size=500).filter(lambda noise: b"\0" not in noise)


def _cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


@given(st.lists(FRAMES, max_size=20), NOISE, CUTS)
def test_frames_survive_noise_before_them_and_any_cuts(sent: list[frames.Frame], noise: bytes, cuts: list[int]) -> None:
    whole = noise + frames.GREETING + b"".join(frames.build_frame(*frame) for frame in sent)
    decoder = Decoder()
    assert [frame for piece in _cut(whole, cuts) for frame in decoder.feed(piece)] == sent


@given(st.integers(0, 3000), st.integers(1, 700))
def test_noise_has_a_bound_wherever_it_is_cut(size: int, step: int) -> None:
    decoder = Decoder(noise_max_bytes=1000)
    whole = b"x" * size + frames.GREETING
    pieces = [whole[at : at + step] for at in range(0, len(whole), step)]
    if size <= 1000:
        assert not any(map(decoder.feed, pieces))
        assert decoder.greeted
    else:
        with pytest.raises(MuxGreetingError, match="xxx"):
            for piece in pieces:
                decoder.feed(piece)


@given(st.binary(max_size=400), CUTS, st.booleans())
def test_garbage_is_a_typed_error_or_nothing(data: bytes, cuts: list[int], is_opener: bool) -> None:
    side = Session(is_opener=is_opener, on_change=lambda channel: None)
    try:
        for piece in _cut(frames.GREETING + data, cuts):
            side.feed(piece)
    except MuxError as error:
        assert isinstance(error, MuxProtocolError)


class _Pair:
    """Two sessions and what is under way between them. The second accepts everything."""

    def __init__(self) -> None:
        self.came: dict[int, Channel] = {}
        self.client = Session(is_opener=True, on_change=lambda channel: None)
        self.bridge = Session(is_opener=False, on_change=self._on_change)
        self.pump([])

    def _on_change(self, channel: Channel) -> None:
        if channel.number not in self.came:
            self.came[channel.number] = channel
            self.bridge.accept(channel)

    def pump(self, cuts: list[int]) -> None:
        while self.client.has_output or self.bridge.has_output:
            for source, target in ((self.bridge, self.client), (self.client, self.bridge)):
                for piece in _cut(source.output(), cuts):
                    target.feed(piece)


STREAMS = 4
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "answer", "take", "fetch", "pump", "end", "hang up"]),
        st.integers(0, STREAMS - 1),
        st.integers(1, 400_000),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(STEPS, CUTS)
def test_every_byte_arrives_in_order_under_bounds_and_after_them_the_end(
    steps: list[tuple[str, int, int]], cuts: list[int]
) -> None:
    pair = _Pair()
    mine = [pair.client.open(str(number)) for number in range(STREAMS)]
    pair.pump([])
    theirs = [pair.came[channel.number] for channel in mine]
    sent: dict[Channel, bytes] = defaultdict(bytes)
    got: dict[Channel, bytes] = defaultdict(bytes)
    other = {**dict(zip(mine, theirs, strict=True)), **dict(zip(theirs, mine, strict=True))}
    ended = set()

    def send(side: Session, channel: Channel, size: int) -> None:
        data = os.urandom(16) * (size // 16 + 1)
        taken = side.send(channel, data)
        assert taken <= session.OUTBOX_BYTES
        sent[channel] += data[:taken]

    def take(side: Session, channel: Channel, size: int) -> None:
        got[other[channel]] += side.take(channel, size)

    for what, at, size in steps:
        match what:
            case "send":
                send(pair.client, mine[at], size)
            case "answer":
                send(pair.bridge, theirs[at], size)
            case "take":
                take(pair.bridge, theirs[at], size)
            case "fetch":
                take(pair.client, mine[at], size)
            case "pump":
                pair.pump(cuts)
            case "end":
                pair.client.end(mine[at])
                ended.add(mine[at])
            case "hang up":
                pair.bridge.end(theirs[at])
                ended.add(theirs[at])
        for channel in (*mine, *theirs):
            assert channel._untaken_bytes <= session.WINDOW_BYTES
    before: dict[Channel, bytes] | None = None
    while before != got:
        before = dict(got)
        pair.pump(cuts)
        for ours, far in zip(mine, theirs, strict=True):
            while far.has_bytes:
                take(pair.bridge, far, 1 << 20)
            while ours.has_bytes:
                take(pair.client, ours, 1 << 20)
    for channel in (*mine, *theirs):
        assert got[channel] == sent[channel]
        assert other[channel].ended == (channel in ended)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 600_000), min_size=1, max_size=8), st.integers(1, 200_000))
def test_streams_of_any_size_come_back_whole_through_a_bridge(sizes: list[int], step: int) -> None:
    ours, theirs = socket.socketpair()
    other_fd = os.dup(theirs.fileno())
    bridge = threading.Thread(target=Bridge(theirs.fileno(), other_fd).run)
    bridge.start()
    fd = ours.detach()
    mux = Mux(fd, fd)
    with tempfile.TemporaryDirectory() as directory:
        listeners = Listeners(Path(directory))
        try:
            threads = []
            results: dict[int, bool] = {}
            for index, size in enumerate(sizes):
                data = os.urandom(size)
                stream = mux.open(listeners.targets[index % 2], 10)
                stream.settimeout(20)

                def receive(index: int = index, data: bytes = data, stream=stream) -> None:
                    came = b""
                    while piece := stream.recv(70_000):
                        came += piece
                    results[index] = came == data

                def send(data: bytes = data, stream=stream) -> None:
                    for at in range(0, len(data), step):
                        stream.sendall(data[at : at + step])
                    stream.end()

                threads += [threading.Thread(target=receive), threading.Thread(target=send)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert results == dict.fromkeys(range(len(sizes)), True)
            assert mux.session.channels == []
        finally:
            listeners.close()
            mux.close()
            bridge.join()
            theirs.close()
            os.close(other_fd)
