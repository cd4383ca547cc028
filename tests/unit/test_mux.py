"""The multiplexer over real pipes, to real listeners, by the bridge as it runs on a node."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpc_workspace.mux import frames, session
from hpc_workspace.mux.frames import MuxError, MuxGreetingError, MuxProtocolError, MuxSilenceError
from hpc_workspace.mux.streams import Mux, MuxStream, Pulse, StreamRefusedError
from tests.listeners import Listeners

PACKAGE = str(Path(__file__).parents[2])
BRIDGE = [sys.executable, "-I", "-S", "-c"]
RUN = "from hpc_workspace.node.bridge import run_and_exit; run_and_exit()"


class Far:
    """A bridge in a process of its own, and the multiplexer that speaks with it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"import sys; sys.path.insert(0, {PACKAGE!r}); {RUN}"
            self.process = subprocess.Popen([*BRIDGE, code], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
        fd = ours.detach()
        self.mux = Mux(fd, fd)
        self.mux.wait_greeted(20)

    def open(self, target: str) -> MuxStream:
        stream = self.mux.open(target, 20)
        stream.settimeout(20)
        return stream

    def close(self) -> tuple[int, str]:
        """Its exit code, and what it printed."""
        self.mux.close()
        said = self.process.communicate(timeout=20)[1]
        return self.process.returncode, said.decode()


@pytest.fixture
def far() -> Iterator[Far]:
    bridge = Far()
    yield bridge
    bridge.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Listeners]]:
    made: list[Listeners] = []

    def make(*arguments: Callable[[socket.socket], None]) -> Listeners:
        made.append(Listeners(tmp_path, *arguments))
        return made[-1]

    yield make
    for listeners in made:
        listeners.close()


class Peer:
    """The other end of a multiplexer's pipe, in the hands of the test."""

    def __init__(self, *, first: bytes = frames.GREETING, **timing: float) -> None:
        ours, self.socket = socket.socketpair()
        fd = ours.detach()
        self.mux = Mux(fd, fd, **timing)
        self.socket.settimeout(20)
        self.socket.sendall(first)

    def say(self, kind: int, number: int = 0, payload: bytes = b"") -> None:
        self.socket.sendall(frames.build_frame(kind, number, payload))

    def open(self) -> MuxStream:
        """A stream that this peer accepts."""
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(self.mux.open, "x", 20)
            decoder = frames.Decoder()
            while not any(frame[0] == frames.OPEN for frame in decoder.feed(self.socket.recv(4096))):
                continue
            self.say(frames.OPENED, 1)
            return opening.result()


def receive(stream: MuxStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = stream.recv(1 << 20)
        assert piece
        data += piece
    return data


def test_it_reaches_a_unix_socket_and_a_port_and_keeps_half_closes(far: Far, serve: Callable[..., Listeners]) -> None:
    for target in serve().targets:
        stream = far.open(target)
        stream.sendall(b"hello")
        assert receive(stream, 5) == b"hello"
        assert not stream.is_readable()
        stream.end()
        assert stream.recv(10) == b""
        assert stream.is_readable()
        with pytest.raises(BrokenPipeError):
            stream.sendall(b"more")
    assert far.mux.session.channels == []


def test_the_bridge_ends_when_its_stdin_does_and_says_nothing(far: Far, serve: Callable[..., Listeners]) -> None:
    far.open(serve().targets[0])
    assert far.close() == (0, "")


def test_a_bridge_that_hears_garbage_says_so_and_ends(far: Far) -> None:
    ended = subprocess.run(
        [*BRIDGE, f"import sys; sys.path.insert(0, {PACKAGE!r}); {RUN}"],
        input=frames.GREETING + b"\xff" * 20,
        capture_output=True,
        timeout=20,
    )
    assert ended.returncode == 1
    assert ended.stdout == frames.GREETING
    assert "this is no frame" in ended.stderr.decode()


def test_the_bridge_loads_nothing_heavy() -> None:
    code = (
        f"import sys; sys.path.insert(0, {PACKAGE!r}); import hpc_workspace.node.bridge; "
        "print(*(m for m in ('pydantic', 'logging', 'subprocess', 'threading', 'json', 'ssl') if m in sys.modules))"
    )
    assert subprocess.run([*BRIDGE, code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("unix:{dir}/file", "not a Unix socket of this user's"),
        ("unix:{dir}/link", "not a Unix socket of this user's"),
        ("unix:{dir}/nothing", "No such file"),
        ("unix:{dir}/abandoned", "Connection refused"),
        ("unix:relative", "neither a Unix socket nor a port"),
        ("unix:\0abstract", "neither a Unix socket nor a port"),
        ("unix:/nul\0", "null"),
        ("tcp:1", "Connection refused"),
        ("tcp:0", "neither a Unix socket nor a port"),
        ("tcp:99999999999", "neither a Unix socket nor a port"),
        ("tcp:10.0.0.1:80", "neither a Unix socket nor a port"),
        ("nonsense", "neither a Unix socket nor a port"),
    ],
)
def test_what_is_no_listener_of_ours_is_refused_with_the_reason(
    far: Far, serve: Callable[..., Listeners], tmp_path: Path, target: str, reason: str
) -> None:
    listeners = serve()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(listeners.path)
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(tmp_path / "abandoned"))
    with pytest.raises(StreamRefusedError, match=reason):
        far.open(target.format(dir=tmp_path))
    stream = far.open(listeners.targets[0])  # and the others go on
    stream.sendall(b"x")
    assert stream.recv(1) == b"x"


def test_who_does_not_receive_holds_up_nobody_else_and_memory_has_a_bound(
    far: Far, serve: Callable[..., Listeners]
) -> None:
    came = [0]
    stop = threading.Event()

    def pour(connection: socket.socket) -> None:
        if connection.recv(1) == b"e":
            connection.sendall(b"e")
            return
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                came[0] += connection.send(bytes(65536))
        stop.set()

    listeners = serve(pour)
    slow = far.open(listeners.targets[0])
    slow.sendall(b"p")
    assert stop.wait(20)
    # One window, what the bridge holds for its turn, and the kernel's buffers.
    assert came[0] < session.WINDOW_BYTES + session.OUTBOX_BYTES + 1_000_000
    quick = far.open(listeners.targets[1])
    quick.sendall(b"e")
    assert quick.recv(1) == b"e"
    assert receive(slow, came[0]) == bytes(came[0])


def test_a_listener_that_does_not_read_holds_up_nobody_else_and_time_runs_out(
    far: Far, serve: Callable[..., Listeners]
) -> None:
    release = threading.Event()

    def stall(connection: socket.socket) -> None:
        if connection.recv(1) == b"e":
            connection.sendall(b"e")
            return
        release.wait(20)
        count = 0
        while data := connection.recv(65536):
            count += len(data)
        connection.sendall(struct.pack(">Q", count))

    listeners = serve(stall)
    slow = far.open(listeners.targets[0])
    slow.sendall(b"s")
    slow.settimeout(0.3)
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            slow.sendall(bytes(10_000))
            sent += 10_000
    assert session.WINDOW_BYTES < sent < session.WINDOW_BYTES + session.OUTBOX_BYTES + 1_000_000
    quick = far.open(listeners.targets[1])
    quick.sendall(b"e")
    assert quick.recv(1) == b"e"
    release.set()
    slow.end()
    slow.settimeout(20)
    assert sent <= struct.unpack(">Q", receive(slow, 8))[0] <= sent + 10_000


def test_fifty_streams_at_once_get_their_own_bytes(far: Far, serve: Callable[..., Listeners]) -> None:
    targets = serve().targets

    def one(number: int) -> bool:
        data = os.urandom(1000) * (number * 7)
        stream = far.open(targets[number % 2])
        sender = threading.Thread(target=lambda: (stream.sendall(data), stream.end()))
        sender.start()
        came = b""
        while piece := stream.recv(1 << 20):
            came += piece
        sender.join()
        return came == data

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(one, range(1, 51))) == [True] * 50


def test_closing_wakes_who_receives_and_who_sends(serve: Callable[..., Listeners]) -> None:
    peer = Peer()
    stream = peer.open()
    with ThreadPoolExecutor(2) as pool:
        receiving = pool.submit(stream.recv, 10)
        sending = pool.submit(stream.sendall, bytes(10 * session.WINDOW_BYTES))
        taken = 0
        while taken < session.WINDOW_BYTES:  # until the window is full
            taken += len(peer.socket.recv(1 << 20))
        stream.close()
        assert receiving.result(20) == b""
        with pytest.raises(BrokenPipeError):
            sending.result(20)
    peer.mux.close()


def test_what_was_sent_before_a_close_still_arrives(far: Far, serve: Callable[..., Listeners]) -> None:
    came = bytearray()
    ended = threading.Event()

    def keep(connection: socket.socket) -> None:
        while data := connection.recv(65536):
            came.extend(data)
        ended.set()

    stream = far.open(serve(keep).targets[0])
    stream.sendall(b"x" * 700_000)
    stream.close()
    assert ended.wait(20)
    assert came == b"x" * 700_000


def test_a_far_end_that_breaks_is_a_reset_after_its_last_bytes(far: Far, serve: Callable[..., Listeners]) -> None:
    def break_off(connection: socket.socket) -> None:
        connection.sendall(b"last")
        assert connection.recv(1) == b"b"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    stream = far.open(serve(break_off).targets[1])
    assert receive(stream, 4) == b"last"
    stream.sendall(b"b")
    with pytest.raises(ConnectionResetError, match="reset by peer"):
        stream.recv(10)
    assert stream.is_readable()


def test_an_answer_to_what_was_not_read_to_its_end_can_be_received(far: Far, serve: Callable[..., Listeners]) -> None:
    def answer_early(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(b"no")

    stream = far.open(serve(answer_early).targets[0])
    with contextlib.suppress(ConnectionError):
        stream.sendall(bytes(3_000_000))
    assert receive(stream, 2) == b"no"


def test_time_runs_out_and_bytes_that_come_later_are_not_lost() -> None:
    peer = Peer()
    stream = peer.open()
    stream.settimeout(0.05)
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        stream.recv(10)
    peer.say(frames.DATA, 1, b"late")
    stream.settimeout(20)
    assert stream.recv(2) == b"la"
    assert stream.recv(2) == b"te"
    peer.mux.close()


def test_noise_before_the_greeting_is_passed_over() -> None:
    peer = Peer(first=b"Welcome to the cluster!\r\nsrun: job 7 queued\n" * 100 + frames.GREETING)
    peer.mux.wait_greeted(20)
    stream = peer.open()
    peer.say(frames.DATA, 1, b"x")
    assert stream.recv(1) == b"x"
    peer.mux.close()


def test_a_stranger_who_talks_on_is_quoted_without_control_characters_and_told_nothing() -> None:
    peer = Peer(first=b"")
    with contextlib.suppress(ConnectionError):  # it is cut off
        for _ in range(70):
            peer.socket.sendall(b"login:\x1b[31m " * 100)
    with pytest.raises(MuxGreetingError) as error:
        peer.mux.wait_greeted(20)
    assert "login: [31m login:" in str(error.value)
    assert "\x1b" not in str(error.value)
    assert peer.mux.wait_closed(20)
    with contextlib.suppress(ConnectionResetError):  # what it said was not all read
        assert peer.socket.recv(100) == b""


def test_a_stranger_who_leaves_is_quoted() -> None:
    peer = Peer(first=b"python: not found\n")
    peer.socket.close()
    with pytest.raises(MuxGreetingError, match="did not start; it said: python: not found"):
        peer.mux.wait_greeted(20)


def test_a_terminal_on_the_way_and_another_version_are_named() -> None:
    with pytest.raises(MuxGreetingError, match="changes newlines"):
        Peer(first=frames.GREETING.replace(b"\n", b"\r\n")).mux.wait_greeted(20)
    with pytest.raises(MuxGreetingError, match="version 99"):
        Peer(first=frames.GREETING[:-1] + bytes([99])).mux.wait_greeted(20)


def test_who_never_greets_is_given_up() -> None:
    peer = Peer(first=b"")
    with pytest.raises(MuxSilenceError, match="no bridge answered"):
        peer.mux.wait_greeted(0.05)
    assert peer.mux.wait_closed(20)


@pytest.mark.parametrize(
    "garbage",
    [
        b"bash: warning: something\n",
        frames.build_frame(frames.DATA, 77, b"x"),
        frames.build_frame(frames.OPEN, 5, b"tcp:1"),
        frames.build_frame(frames.OPENED, 1),
        frames.build_frame(frames.WINDOW, 1, frames.build_count(1)),
        frames.build_frame(frames.DATA, 1, bytes(60_000)) * 18,
        frames.build_frame(frames.EOF, 1) + frames.build_frame(frames.DATA, 1, b"x"),
    ],
)
def test_what_can_not_be_said_ends_the_pipe_and_every_stream(garbage: bytes) -> None:
    peer = Peer()
    stream = peer.open()
    with contextlib.suppress(ConnectionError):
        peer.socket.sendall(garbage)
    assert peer.mux.wait_closed(20)
    assert isinstance(peer.mux.error, MuxProtocolError)
    with contextlib.suppress(ConnectionResetError):
        while stream.recv(1 << 20):
            continue
    with pytest.raises(ConnectionError):
        stream.sendall(b"x")
    with pytest.raises(MuxProtocolError):
        peer.mux.open("tcp:1", 1)


def test_a_bridge_that_dies_ends_every_stream_and_what_has_come_can_be_received(
    far: Far, serve: Callable[..., Listeners]
) -> None:
    stream = far.open(serve().targets[0])
    stream.sendall(b"x")
    with stream.changed:
        assert stream.changed.wait_for(stream.is_readable, 20)
    far.process.kill()
    assert far.mux.wait_closed(20)
    assert stream.recv(1) == b"x"
    with pytest.raises(ConnectionResetError, match="the bridge is gone"):
        stream.recv(1)
    assert isinstance(far.mux.error, MuxError)


def test_a_pipe_that_is_silently_dead_is_noticed() -> None:
    peer = Peer(ping_after_s=0.05, dead_after_s=0.2)
    stream = peer.open()
    with pytest.raises(ConnectionResetError, match="silent"):
        stream.recv(1)
    assert isinstance(peer.mux.error, MuxSilenceError)


def test_a_pipe_that_is_merely_quiet_lives() -> None:
    peer = Peer(ping_after_s=0.02, dead_after_s=20)
    stream = peer.open()
    decoder = frames.Decoder()
    decoder.feed(frames.GREETING)
    pings = 0
    while pings < 5:
        for kind, _, _ in decoder.feed(peer.socket.recv(4096)):
            assert kind == frames.PING
            pings += 1
            peer.say(frames.PONG)
    assert peer.mux.error is None
    peer.say(frames.DATA, 1, b"x")
    assert stream.recv(1) == b"x"
    peer.mux.close()


def test_the_pulse_asks_after_silence_either_way_and_gives_up_after_more() -> None:
    pulse = Pulse(15, 45, now_s=100)
    assert not pulse.is_due(114)
    assert pulse.wait_s(114) == 1
    assert pulse.is_due(115)
    assert not pulse.is_due(144)
    pulse.heard(144)
    pulse.sent(144)
    assert pulse.wait_s(144) == 15
    pulse.heard(158)  # the other side talks, and this one listens: it asks all the same, to be heard
    assert pulse.is_due(159)
    assert pulse.wait_s(159) == 30
    with pytest.raises(MuxSilenceError):
        pulse.is_due(189)


def test_closing_leaves_no_descriptor_and_no_thread() -> None:
    gc.collect()  # what other tests have left in cycles would go in the middle of this one
    before = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    for _ in range(3):
        far = Far()
        with pytest.raises(StreamRefusedError):
            far.open("tcp:1")
        assert far.close() == (0, "")
        assert far.mux.wait_closed(20)
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() <= threads
