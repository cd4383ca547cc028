"""The host of an interactive session by itself, and this end of one against a made-up other side."""

from __future__ import annotations

import ast
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpc_workspace.interactive
from hpc_workspace import clock
from hpc_workspace.connect.streams import SocketStream, Stream
from hpc_workspace.errors import CommandError, ContainerError, PrerequisiteError, TunnelLostError, WorkspaceError
from hpc_workspace.exchange import Wish
from hpc_workspace.interactive import Session, frames, open_session
from hpc_workspace.interactive.host import accept_client
from hpc_workspace.interactive.start import build_host_command
from hpc_workspace.record import Record
from hpc_workspace.results import CommandResult, OutputChunk

INSIDE = [Path(hpc_workspace.interactive.__file__).with_name(f"{name}.py") for name in ("frames", "host")]
TOKEN = b"t" * frames.TOKEN_BYTES


def make_record(runtime: str = "process", server: str = "bundled") -> Record:
    return Record(
        workspace_id="ws-0123456789",
        launch_id="0" * 16,
        job_id=None,
        restart_count=0,
        state="ready",
        node="n01",
        port=1,
        socket="",
        python=sys.executable,
        owner="",
        server=server,
        runtime=runtime,
        working_dir="/workspace",
        node_scratch="",
        started_at=0.0,
    )


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: path.name)
def test_what_runs_inside_is_python_3_8_and_needs_the_standard_library_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in named}
    ours = {module for module in modules if module not in sys.stdlib_module_names}
    assert ours <= {"hpc_workspace.interactive"}


@pytest.mark.parametrize(
    ("runtime", "server"), [("process", "bundled"), ("apptainer", "bundled"), ("apptainer", "image")]
)
def test_the_line_that_starts_the_host_is_one_that_the_kernel_and_a_shell_take(runtime: str, server: str) -> None:
    line = build_host_command(make_record(runtime, server))
    assert len(line) < 64 * 1024
    assert subprocess.run(["sh", "-n"], input=line.encode(), check=True).returncode == 0


class StartedHost:
    """A host that was started as in a workspace: where it listens, and its token."""

    def __init__(self) -> None:
        line = build_host_command(make_record())
        ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=30, check=True)
        told = json.loads(ended.stdout)
        self.port, self.token = told["port"], told["token"]
        assert ended.stderr == ""

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def begin(self, wish: dict[str, object]) -> socket.socket:
        connection = self.connect()
        connection.sendall(self.token.encode() + frames.build_frame(frames.START, json.dumps(wish).encode()))
        return connection


def wish_for(command: str) -> dict[str, object]:
    return {"command": command, "shell": None, "cwd": "/", "env": {}, "terminal": None}


def frames_of(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    decoder = frames.Decoder()
    while data := connection.recv(65536):
        yield from decoder.feed(data)


def test_the_host_serves_one_client_and_then_listens_no_more() -> None:
    host = StartedHost()
    with host.connect() as stranger, host.begin(wish_for("echo said; read x; exit 3")) as ours:
        said = frames_of(ours)
        assert [next(said), next(said)] == [(frames.STARTED, b""), (frames.STDOUT, b"said\n")]
        with pytest.raises(ConnectionRefusedError):
            host.connect()
        assert stranger.recv(1) == b""
        ours.sendall(frames.build_frame(frames.INPUT_END))
        assert list(said) == [(frames.EXIT, frames.build_code(3))]


def test_what_is_left_of_the_output_waits_for_a_client_that_takes_nothing_for_a_while() -> None:
    host = StartedHost()
    size = frames.WINDOW_BYTES + 30_000  # the program has ended when the last of it is still in its pipe
    with host.begin(wish_for(f"head -c {size} /dev/zero")) as ours:
        said = frames_of(ours)
        received = 0
        while received < frames.WINDOW_BYTES:
            kind, payload = next(said)
            received += len(payload) if kind == frames.STDOUT else 0
        until_s = clock.now_s() + 0.3
        while clock.now_s() < until_s:
            ours.sendall(frames.build_frame(frames.PING))
            while next(said) != (frames.PONG, b""):
                continue
        ours.sendall(frames.build_frame(frames.CREDIT, frames.build_count(received)))
        *rest, last = said
    assert received + sum(len(payload) for kind, payload in rest) == size
    assert last == (frames.EXIT, frames.build_code(0))


def test_its_token_is_in_nobody_s_argv_or_environment() -> None:
    host = StartedHost()
    secret = host.token.encode()
    with host.begin(wish_for("cat /proc/$PPID/cmdline /proc/$PPID/environ; env")) as ours:
        said = b"".join(payload for kind, payload in frames_of(ours) if kind == frames.STDOUT)
    assert b"utf8" in said  # its own words, to be sure that it was looked at
    assert secret not in said


def test_what_is_no_frame_ends_the_session() -> None:
    host = StartedHost()
    with host.begin(wish_for("echo $$; exec sleep 4301")) as ours:
        said = frames_of(ours)
        next(said)
        pid = int(next(said)[1])
        ours.sendall(b"\xff" * 100)
        assert list(said) == []
    assert not Path(f"/proc/{pid}").exists()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def connect(listener: socket.socket) -> socket.socket:
    return socket.create_connection(listener.getsockname(), timeout=30)


def test_who_says_nothing_or_the_wrong_thing_keeps_nobody_out(listener: socket.socket) -> None:
    silent = [connect(listener) for _ in range(70)]  # more than are listened to at once
    with connect(listener) as wrong, connect(listener) as ours:
        wrong.sendall(b"x" * frames.TOKEN_BYTES)
        for piece in (TOKEN[:10], TOKEN[10:] + b"more"):
            ours.sendall(piece)
        found = accept_client(listener, TOKEN, 30)
        assert found is not None
        accepted, rest = found
        with accepted:
            assert accepted.getpeername() == ours.getsockname()
        assert rest in (b"", b"more")
        assert wrong.recv(1) == b""
    for connection in silent:
        connection.close()


def test_where_nobody_comes_it_ends(listener: socket.socket) -> None:
    with connect(listener):
        assert accept_client(listener, TOKEN, 0.05) is None


def open_in(record: Record, ended: CommandResult) -> Session:
    """A session in a workspace where the command that starts the host ended so."""

    def execute(command: str, *, cwd: str | None, timeout_s: float, env: dict[str, str] | None) -> CommandResult:
        return ended

    def dial(wish: Wish, call_began_s: float = 0.0) -> Stream:
        raise AssertionError("there is nowhere to dial to")

    return open_session(
        None,
        cwd=None,
        env=None,
        terminal=None,
        shell=None,
        record=record,
        execute=execute,
        dial=dial,
        explain=lambda error, since_s: error,
    )


def test_an_image_without_python_is_told_so() -> None:
    with pytest.raises(PrerequisiteError, match="no python3"):
        open_in(make_record("apptainer", "image"), CommandResult(command="", exit_code=127))


def test_what_the_workspace_says_of_a_failure_reaches_no_terminal_as_it_is() -> None:
    ended = CommandResult(command="", exit_code=1, stdout="[1]", stderr="\x1b]0;title\x07 no\nmemory")
    with pytest.raises(CommandError) as caught:
        open_in(make_record(), ended)
    assert caught.value.evidence == "]0;title  no memory"


class OtherSide:
    """A host that says what the test wants."""

    def __init__(self) -> None:
        ours, self._socket = socket.socketpair()
        self._socket.settimeout(30)
        self._said = frames_of(self._socket)
        self.stream = SocketStream(ours)

    def say(self, kind: int, payload: bytes = b"") -> None:
        self._socket.sendall(frames.build_frame(kind, payload))

    def hear(self) -> tuple[int, bytes]:
        return next(self._said)

    def hang_up(self) -> None:
        self._socket.close()


def test_output_that_came_before_the_loss_is_still_given_out() -> None:
    other = OtherSide()
    session = Session(other.stream, frames.build_frame(frames.STDOUT, b"early"), node="n01")
    other.say(frames.STDERR, b"late")
    other.hang_up()
    assert [session.receive(), session.receive()] == [
        OutputChunk(stream="stdout", data=b"early"),
        OutputChunk(stream="stderr", data=b"late"),
    ]
    with pytest.raises(TunnelLostError, match="session on n01 was lost"):
        session.receive()
    assert session.exit_code is None
    assert repr(session) == "<Session on n01 [lost]>"


def test_what_broke_the_connection_is_asked_once() -> None:
    asked = []

    def explain(error: WorkspaceError, since_s: float) -> WorkspaceError:
        asked.append(error)
        return ContainerError("somebody else closed it")

    other = OtherSide()
    session = Session(other.stream, explain=explain)
    other.hang_up()
    for _ in range(2):
        with pytest.raises(ContainerError, match="somebody else"):
            session.receive()
    assert len(asked) == 1


def test_a_writer_waits_for_a_program_that_does_not_read() -> None:
    other = OtherSide()
    session = Session(other.stream)
    writer = threading.Thread(target=session.send, args=(bytes(frames.WINDOW_BYTES + 5),), daemon=True)
    writer.start()
    received = 0
    while received < frames.WINDOW_BYTES:
        kind, payload = other.hear()
        assert kind == frames.INPUT
        received += len(payload)
    assert received == frames.WINDOW_BYTES
    assert writer.is_alive()
    other.say(frames.CREDIT, frames.build_count(5))
    assert other.hear() == (frames.INPUT, bytes(5))
    writer.join(30)
    assert not writer.is_alive()
    session.close()


def test_credit_goes_back_for_what_was_taken_and_not_for_what_only_came() -> None:
    other = OtherSide()
    session = Session(other.stream)
    piece = bytes(frames.DATA_MAX_BYTES)
    for _ in range(4):
        other.say(frames.STDOUT, piece)
    session.send(b"x")
    assert other.hear() == (frames.INPUT, b"x")  # and nothing before it
    for _ in range(4):
        assert session.receive() is not None
    assert other.hear() == (frames.CREDIT, frames.build_count(4 * len(piece)))
    session.close()


def test_a_signal_and_a_new_size_get_past_input_that_is_not_read() -> None:
    other = OtherSide()
    session = Session(other.stream)
    session.send(bytes(frames.WINDOW_BYTES))
    received = 0
    while received < frames.WINDOW_BYTES:
        received += len(other.hear()[1])
    session.resize(10, 20)
    assert other.hear() == (frames.RESIZE, frames.build_size(10, 20))
    session.send_signal(2)
    assert other.hear() == (frames.SIGNAL, b"\x02")
    session.close()


def test_after_the_exit_code_nothing_is_lost_and_nothing_can_be_sent() -> None:
    other = OtherSide()
    session = Session(other.stream)
    other.say(frames.STDOUT, b"last")
    other.say(frames.EXIT, frames.build_code(-9))
    other.hang_up()
    assert b"".join(chunk.data for chunk in session) == b"last"
    assert session.exit_code == -9
    with pytest.raises(BrokenPipeError):
        session.send(b"x")
    session.close()
    session.close()


def test_a_reader_s_patience_ends_and_the_session_goes_on() -> None:
    other = OtherSide()
    session = Session(other.stream)
    with pytest.raises(TimeoutError):
        session.receive(0.01)
    other.say(frames.STDOUT, b"now")
    chunk = session.receive(30)
    assert chunk is not None
    assert chunk.data == b"now"
    session.close()


def test_closing_wakes_who_waits() -> None:
    other = OtherSide()
    session = Session(other.stream)
    closing = threading.Timer(0.01, session.close)
    closing.start()
    with pytest.raises(TunnelLostError, match="closed"):
        session.receive()
