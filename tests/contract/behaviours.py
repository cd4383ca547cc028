"""What every workspace does, whatever it runs in: one function a claim, each taking an open workspace.

Imports nothing but the package, so that it also runs on the nodes of the test cluster:

    python behaviours.py '{"image": "/shared/images/tiny.sif"}'

prints one line of JSON a claim: its name, and what went wrong, or null.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import http.server
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace
from hpc_workspace.errors import CommandError, FileChangedError, FileError, GitError, UnknownCommandError
from hpc_workspace.results import CommandResult, OutputChunk


@contextlib.contextmanager
def pytest_raises(kind: type[Exception]) -> Iterator[list[Any]]:
    """As pytest's, which the nodes do not have; gives a list that gets the error."""
    caught: list[Any] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    assert caught, f"no {kind.__name__}"


def it_keeps_stdout_stderr_and_exit_code_apart(w: Workspace) -> None:
    result = w.execute_command("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 3)
    assert result.timeout_occurred is False
    assert result.command == "echo out; echo err >&2; exit 3"


def it_starts_commands_in_the_working_dir(w: Workspace) -> None:
    assert w.execute_command("pwd").stdout.strip() == w.working_dir


def it_makes_the_working_dir_writable(w: Workspace) -> None:
    assert w.execute_command("touch it && rm it").exit_code == 0


def it_gives_commands_an_empty_stdin(w: Workspace) -> None:
    assert w.execute_command("cat; echo done", timeout=10).stdout == "done\n"


def it_adds_env_to_the_command_and_quotes_it(w: Workspace) -> None:
    value = "a b'c\"d$e"
    assert w.execute_command('printf %s "$X"', env={"X": value}).stdout == value


def it_says_when_the_time_ran_out_and_keeps_what_was_printed(w: Workspace) -> None:
    result = w.execute_command("echo before; sleep 30", timeout=1)
    assert result.timeout_occurred
    assert result.exit_code == -1
    assert result.stdout == "before\n"


def it_streams_output_and_ends_with_the_result(w: Workspace) -> None:
    items = list(w.stream_command("echo one; echo two >&2; exit 4"))
    chunks = [item for item in items if isinstance(item, OutputChunk)]
    assert b"".join(c.data for c in chunks if c.stream == "stdout") == b"one\n"
    assert b"".join(c.data for c in chunks if c.stream == "stderr") == b"two\n"
    last = items[-1]
    assert isinstance(last, CommandResult)
    assert last.exit_code == 4


def it_carries_files_both_ways_with_mode_and_any_name(w: Workspace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a b;ü.sh")
        source.write_bytes(bytes(range(256)) * 5000)
        source.chmod(0o755)
        assert w.file_upload(source, "d/a b;ü.sh").file_size == 1280000
        assert w.execute_command("test -x 'd/a b;ü.sh'").exit_code == 0
        w.file_download("d/a b;ü.sh", Path(folder, "back"))
        assert Path(folder, "back").read_bytes() == source.read_bytes()


def it_reads_and_writes_files_whole(w: Workspace) -> None:
    w.write_file("x.txt", "grüß\n")
    assert w.read_file("x.txt") == "grüß\n".encode()


# --- files ---


def _make_tree(root: Path) -> None:
    """A directory with all that a directory can hold, and nothing that can't be copied."""
    names = ("plain", "a b;c", "new\nline", "grüß", "\udcff\udcfe", "-n", "*", "x" * 200)
    for number, name in enumerate(names):
        path = root / f"d{number % 3}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * number * 1000)
        path.chmod((0o644, 0o755, 0o400)[number % 3])
        os.utime(path, ns=(10**18, 10**18 + number * 123_456_789))
    (root / "empty").mkdir()
    (root / "to-nowhere").symlink_to("nowhere at all")
    (root / "to-passwd").symlink_to("/etc/passwd")
    (root / "d0" / "up").symlink_to("../d1/a b;c")
    (root / "d1").chmod(0o550)


def _seen(root: Path) -> dict[str, tuple[object, ...]]:
    """What is in a directory: mode, time and content of each file, the text of each link, the mode of each directory."""
    seen: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        status, name = path.lstat(), str(path.relative_to(root))
        if path.is_symlink():
            seen[name] = (str(path.readlink()),)
        elif path.is_dir():
            seen[name] = (oct(status.st_mode),)
        else:
            seen[name] = (oct(status.st_mode), status.st_mtime_ns, path.read_bytes())
    return seen


def it_carries_directories_both_ways_with_all_that_is_in_them(w: Workspace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here, back = Path(folder, "here"), Path(folder, "back")
        _make_tree(here)
        sent = w.file_upload(here, "trees/the tree")
        assert sent.file_size == 28_000
        assert w.execute_command("stat -c %a trees/*/d1; cat trees/*/d0/up | wc -c").stdout == "550\n1000\n"
        assert w.file_download("trees/the tree", back).file_size == 28_000
        assert _seen(back) == _seen(here)
        assert (back / "d2").lstat().st_mtime_ns == (here / "d2").lstat().st_mtime_ns
        w.execute_command("rm -rf trees")


def it_keeps_modes_and_times_of_files_both_ways(w: Workspace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "tool")
        source.write_bytes(b"#!/bin/sh\n")
        source.chmod(0o751)
        os.utime(source, ns=(10**18, 1_234_567_890_123_456_789))
        w.file_upload(source, "bin/tool")
        assert w.execute_command("stat -c '%a %Y' bin/tool").stdout == "751 1234567890\n"
        w.file_download("bin/tool", Path(folder, "back"))
        back = Path(folder, "back").stat()
        assert (back.st_mode & 0o777, back.st_mtime_ns) == (0o751, 1_234_567_890_123_456_789)
        w.write_file("bin/tool", b"new", mode=0o640)
        assert w.execute_command("stat -c %a bin/tool; ls -A bin").stdout == "640\ntool\n"


def it_carries_names_that_are_no_utf_8(w: Workspace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(os.fsencode(folder), b"\xff\n x")  # noqa: PTH118 - bytes
        Path(os.fsdecode(source)).write_bytes(b"odd")
        w.file_upload(source, b"odd/\xfe\n y")
        assert w.read_file(b"odd/\xfe\n y") == b"odd"
        w.file_download(b"odd/\xfe\n y", source + b"2")
        assert Path(os.fsdecode(source + b"2")).read_bytes() == b"odd"
        assert w.execute_command("ls odd | wc -l; rm -r odd").stdout == "2\n"


def it_carries_empty_files_and_files_of_holes(w: Workspace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        empty, holes = Path(folder, "empty"), Path(folder, "holes")
        empty.touch()
        with holes.open("wb") as file:
            file.truncate(5_000_001)
            file.seek(3_000_000)
            file.write(b"x")
        for source in (empty, holes):
            w.file_upload(source, source.name)
            w.file_download(source.name, Path(folder, "back"))
            assert Path(folder, "back").read_bytes() == source.read_bytes()
        assert w.execute_command("wc -c < empty; wc -c < holes").stdout.split() == ["0", "5000001"]


def it_puts_a_directory_into_one_that_is_there(w: Workspace) -> None:
    w.execute_command("mkdir -p m/sub; echo old > m/sub/same; echo kept > m/kept; chmod 750 m m/sub")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        (source / "sub").mkdir(parents=True)
        (source / "sub/same").write_text("new\n")
        w.file_upload(source, "m")
        assert w.execute_command("cat m/sub/same m/kept; ls -A m m/sub | wc -l").stdout == "new\nkept\n6\n"
        (source / "kept").mkdir()
        with pytest_raises(FileError):  # a directory where a file is
            w.file_upload(source, "m")
        assert w.execute_command("cat m/kept; rm -r m").stdout == "kept\n"


def it_follows_no_link_out_of_a_directory_that_is_fetched(w: Workspace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outside, mine = Path(folder, "outside"), Path(folder, "mine")
        outside.mkdir()
        w.execute_command(f"mkdir evil; ln -s '{outside}' evil/out; ln -s '{outside}/new' evil/file")
        w.file_download("evil", mine)
        assert (mine / "out").readlink() == outside
        w.execute_command("rm evil/out evil/file; mkdir evil/out; echo gone > evil/out/in; echo gone > evil/file")
        with pytest_raises(FileError):
            w.file_download("evil", mine)
        w.file_download("evil/file", mine / "file")
        assert list(outside.iterdir()) == []
        assert not (mine / "file").is_symlink()
        assert sorted(path.name for path in Path(folder).iterdir()) == ["mine", "outside"]
        w.execute_command("rm -r evil")


def it_leaves_out_of_a_directory_what_holds_no_bytes(w: Workspace) -> None:
    w.execute_command("mkdir odd; mkfifo odd/fifo; echo a > odd/a; ln odd/a odd/b")
    with tempfile.TemporaryDirectory() as folder:
        w.file_download("odd", Path(folder, "odd"))
        assert {name: value[2] for name, value in _seen(Path(folder, "odd")).items()} == {"a": b"a\n", "b": b"a\n"}
        os.mkfifo(Path(folder, "odd/fifo"))
        w.file_upload(Path(folder, "odd"), "odd2")
        assert w.execute_command("ls odd2; rm -r odd odd2").stdout == "a\nb\n"


def it_says_of_a_file_why_not_and_leaves_nothing(w: Workspace) -> None:
    w.execute_command("mkdir there; echo x > there/file")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        source.write_bytes(b"x" * 3_000_000)
        for act, number in (
            (lambda: w.file_download("absent", source.with_name("new")), errno.ENOENT),
            (lambda: w.read_file("absent"), errno.ENOENT),
            (lambda: w.file_upload(source.with_name("absent"), "new"), errno.ENOENT),
            (lambda: w.file_upload(source, "there"), errno.EISDIR),
            (lambda: w.file_upload(source.parent, "there/file"), errno.ENOTDIR),
            (lambda: w.file_download("there/file", source.parent), errno.EISDIR),
            (lambda: w.file_upload(source, "/proc/new"), None),
        ):
            with pytest_raises(FileError) as caught:
                act()
            assert number is None or caught[0].errno == number, caught[0]
            assert isinstance(caught[0], OSError)
        assert [path.name for path in Path(folder).iterdir()] == ["source"]
    assert (
        w.execute_command(
            "ls -A there; ls -A | grep -c part; rm -r there; ls -d /tmp/.hpc-workspace-????????????????????* | wc -l"
        ).stdout
        == "file\n0\n0\n"
    )


def it_tells_of_a_file_that_changes_while_it_is_read(w: Workspace) -> None:
    w.execute_command("head -c 40000000 /dev/zero > log; rm -f stop")
    change = "until [ -e stop ]; do echo x >> log; done"
    w.execute_command(f"setsid sh -c '{change}' >/dev/null 2>&1 </dev/null &")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with pytest_raises(FileChangedError):
                w.file_download("log", Path(folder, "log"))
        finally:
            w.execute_command("touch stop; rm log")
        assert list(Path(folder).iterdir()) == []


def it_tells_how_far_a_transfer_is(w: Workspace) -> None:
    told: list[tuple[int, int | None]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        source.write_bytes(os.urandom(3_000_000))
        for act in (w.file_upload, w.file_download):
            told.clear()
            act(*((source, "far") if act == w.file_upload else ("far", source)), on_progress=lambda *n: told.append(n))
            assert told[-1] == (3_000_000, 3_000_000)
            assert [done for done, _ in told] == sorted(done for done, _ in told)


def it_moves_large_files_in_little_memory(w: Workspace) -> None:
    def most_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    if not Path("/proc/self/status").exists():
        return  # macOS has no such file
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        with source.open("wb") as file:
            for _ in range(100):
                file.write(os.urandom(1_000_000))
        w.file_upload(b"/bin/sh", "warm")
        before = most_bytes()
        w.file_upload(source, "large")
        w.file_download("large", Path(folder, "back"))
        grown = most_bytes() - before
        assert filecmp.cmp(source, Path(folder, "back"), shallow=False)
        assert grown < 32 * 1_048_576, f"{grown / 1e6:.0f} MB more"
    w.execute_command("rm large")


# --- end of files ---


def it_is_alive_and_says_what_serves_it(w: Workspace) -> None:
    assert w.alive
    assert "title" in w.health()


def it_can_be_attached_to_by_its_id_alone(w: Workspace) -> None:
    other = Workspace.attach(w.id)
    assert other.execute_command("echo here").stdout == "here\n"
    other.disconnect()
    assert w.alive


def it_serves_other_clients_at_host_with_the_key_only(w: Workspace) -> None:
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    assert open_url(f"{w.host}/health", timeout=10).status == 200
    try:
        open_url(f"{w.host}/api/git/changes?path=/", timeout=10)
    except urllib.error.HTTPError as error:
        assert error.code == 401
    else:
        raise AssertionError("served without a key")


_FETCH = "python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).read().decode())' {}"


@contextlib.contextmanager
def _served_here() -> Iterator[int]:
    """A server of this side's own, at the port that it gives; it answers with the path that was asked for."""

    class Echo(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"you asked for {self.path}".encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def it_lets_its_processes_call_a_server_on_this_side(w: Workspace) -> None:
    with _served_here() as port, contextlib.closing(w.reverse(port)) as forward:
        fetch = "; ".join(f"{_FETCH.format(f'{forward.url}/{n}')} &" for n in range(6)).replace("&;", "&")
        said = w.execute_command(f"{fetch} wait", timeout=60)
        assert sorted(said.stdout.split("\n")) == ["", *(f"you asked for /{n}" for n in range(6))], said.stderr


def it_lets_nobody_else_on_its_node_call_that_server(w: Workspace) -> None:
    if w.job is not None:
        return  # this side is another machine than the node: nothing to be turned away from here
    with (
        _served_here() as port,
        contextlib.closing(w.reverse(port)) as forward,
        socket.create_connection(("127.0.0.1", forward.port), timeout=20) as stranger,
        contextlib.suppress(ConnectionError),
    ):
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert stranger.recv(1) == b""


def it_closes_a_reverse_forward(w: Workspace) -> None:
    with _served_here() as port:
        forward = w.reverse(port)
        forward.close()
        assert w.execute_command(_FETCH.format(forward.url), timeout=90).exit_code != 0


def it_forwards_a_port_of_its_own_processes(w: Workspace) -> None:
    serve = (
        "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler); "
        "open('port', 'w').write(str(s.server_port)); s.serve_forever()"
    )
    w.execute_command(f'rm -f port; python3 -c "{serve}" >/dev/null 2>&1 & until [ -s port ]; do sleep 0.05; done')
    with contextlib.closing(w.forward(int(w.read_file("port")))) as forward:
        opened = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{forward.url}/port", timeout=20)
        assert opened.read() == w.read_file("port")
    w.execute_command("pkill -f SimpleHTTPRequestHandler || true")


def its_key_is_in_no_command_s_environment_or_argv(w: Workspace) -> None:
    seen = w.execute_command("env; cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    assert w.api_key not in seen


def it_shows_its_state_and_no_key_in_its_repr(w: Workspace) -> None:
    assert w.id in repr(w)
    assert w.api_key not in repr(w)


def it_counts_half_seconds(w: Workspace) -> None:
    result = w.execute_command("sleep 0.9; echo slept", timeout=0.5)
    assert result.timeout_occurred
    assert result.stdout == ""


def it_streams_output_before_the_command_ends(w: Workspace) -> None:
    command = "rm -f go; echo first; until [ -e go ]; do sleep 0.02; done; echo last"
    seen = []
    for item in w.stream_command(command, timeout=5):
        if isinstance(item, OutputChunk):
            seen.append(item.data)
            w.write_file("go", b"")
        else:
            assert not item.timeout_occurred, "nothing came before the end"
    assert b"".join(seen) == b"first\nlast\n"


def it_keeps_every_byte_of_the_output(w: Workspace) -> None:
    result = w.execute_command(r"printf '\377\000x'")
    assert result.stdout.encode("utf-8", "surrogateescape") == b"\xff\x00x"


def it_does_not_wait_for_a_background_child_that_holds_stdout(w: Workspace) -> None:
    result = w.execute_command("sleep 8 & echo done", timeout=3)
    assert not result.timeout_occurred
    assert result.stdout == "done\n"


def it_gives_a_signal_as_a_negative_exit_code(w: Workspace) -> None:
    assert w.execute_command("kill -9 $$").exit_code == -9


def _sleepers(w: Workspace, seconds: int) -> int:
    """How many `sleep SECONDS` there are in the workspace."""
    bracketed = f"{seconds // 10}[{seconds % 10}]"
    look = f"for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done 2>/dev/null | grep -c 'sleep {bracketed}'"
    return int(w.execute_command(look).stdout)


# Its own group, its own session, a shell that ignores TERM, and a parent that is gone.
_SCATTERED = (
    "trap '' TERM; set -m; sleep {0} & setsid sleep {0} & (setsid sh -c 'sleep {0} & sleep {0}' &); sleep {0}; wait"
)


def it_ends_what_a_timed_out_command_started(w: Workspace) -> None:
    for timeout_s in (1, 0.4):
        began_s = time.monotonic()
        assert w.execute_command(_SCATTERED.format(987), timeout=timeout_s).timeout_occurred
        assert time.monotonic() - began_s < 20
        assert _sleepers(w, 987) == 0


def it_lets_a_timed_out_command_tidy_up_and_keeps_what_that_says(w: Workspace) -> None:
    result = w.execute_command("trap 'echo tidied; exit 0' TERM; echo on; sleep 30 & wait", timeout=1)
    assert (result.stdout, result.exit_code, result.timeout_occurred) == ("on\ntidied\n", -1, True)


def it_leaves_alone_what_an_ended_command_left_behind(w: Workspace) -> None:
    w.execute_command("sleep 985 & setsid sleep 985 &")
    w.execute_command("true", timeout=0.5)
    assert _sleepers(w, 985) == 2
    w.execute_command("pkill -f 'sleep 98[5]' || kill $(grep -la 'sleep.985' /proc/[0-9]*/cmdline | cut -d/ -f3)")


def it_tells_every_byte_whatever_it_is_and_wherever_it_is_cut(w: Workspace) -> None:
    data = ("x" + "äöü\u20ac\U0001f600" * 9000).encode() + b"\0\xff\xc3" + bytes(range(256))
    w.write_file("every", data)
    result = w.execute_command("cat every; cat every >&2")
    assert (result.stdout_bytes, result.stderr_bytes) == (data, data)
    assert not result.truncated
    streamed = list(w.stream_command("cat every"))
    assert b"".join(item.data for item in streamed if isinstance(item, OutputChunk)) == data


def it_keeps_the_beginning_of_a_huge_output_and_all_of_it_in_a_file(w: Workspace) -> None:
    result = w.execute_command("head -c 20000000 /dev/zero | tr '\\0' x; echo end; echo err >&2", timeout=60)
    assert (result.exit_code, result.truncated, len(result.stdout)) == (0, True, 8 * 1024 * 1024)
    assert result.stderr == "err\n"
    assert result.stdout_file is not None
    with tempfile.TemporaryDirectory() as folder:
        w.file_download(result.stdout_file, Path(folder, "all"))
        assert Path(folder, "all").stat().st_size == 20000004
        assert Path(folder, "all").read_bytes().endswith(b"xend\n")


def it_gives_a_hundred_megabytes_without_growing(w: Workspace) -> None:
    """In a process of its own, whose peak nothing else has touched."""
    code = (
        "import resource, sys, hpc_workspace as h; w = h.Workspace.attach(sys.argv[1]); w.execute_command('true'); "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        "r = w.execute_command('head -c 100000000 /dev/zero | tr \"\\\\0\" x', timeout=120); "
        "print(r.exit_code, r.truncated, (peak() - before) // 1024)"
    )
    ended = subprocess.run([sys.executable, "-c", code, w.id], capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0, ended.stderr
    exit_code, truncated, grown_mib = ended.stdout.split()
    assert (exit_code, truncated) == ("0", "True")
    assert int(grown_mib) < 64


def it_runs_32_commands_at_once(w: Workspace) -> None:
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda n: w.execute_command(f"sleep 0.2; echo {n}; exit {n}", timeout=120), range(32)))
    assert [(r.stdout, r.exit_code) for r in results] == [(f"{n}\n", n) for n in range(32)]


def it_says_that_a_command_can_not_start(w: Workspace) -> None:
    for call in (w.execute_command, w.start_command, lambda c, cwd: list(w.stream_command(c, cwd=cwd))):
        try:
            call("true", cwd="/does/not/exist")
        except CommandError as error:
            assert error.command == "true"
        else:
            raise AssertionError("it started nowhere")


def it_starts_a_command_that_another_client_follows_to_its_end(w: Workspace) -> None:
    started = w.start_command("echo one; until [ -e follow ]; do sleep 0.05; done; echo two; echo err >&2; exit 5")
    other = Workspace.attach(w.id)
    try:
        first = other.get_command_output(started)
        while not first.stdout:
            first = other.get_command_output(started, wait=0.05)
        assert (first.stdout, first.exit_code, first.is_running) == ("one\n", None, True)
        other.write_file("follow", b"")
        rest = other.get_command_output(started, wait=True, since=first)
        assert (rest.stdout, rest.stderr, rest.exit_code, rest.stdout_from) == ("two\n", "err\n", 5, 4)
    finally:
        other.disconnect()
    again = w.get_command_output(started)
    assert (again.stdout, again.stderr, again.exit_code) == ("one\ntwo\n", "err\n", 5)
    w.execute_command("rm follow")


def it_starts_a_command_whose_result_another_process_gets(w: Workspace) -> None:
    def elsewhere(code: str, *arguments: str) -> str:
        head = "import sys, hpc_workspace as h; w = h.Workspace.attach(sys.argv[1]); "
        argv = [sys.executable, "-c", f"{head}{code}; w.disconnect()", w.id, *arguments]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    started = elsewhere("print(w.start_command('echo on; sleep 1; echo off; exit 6'))")
    told = elsewhere("o = w.get_command_output(sys.argv[2], wait=True); print(o.stdout.split(), o.exit_code)", started)
    assert told == "['on', 'off'] 6"


def it_reads_on_from_where_it_was_in_whole_characters(w: Workspace) -> None:
    started = w.start_command(r"printf 'x\303'; until [ -e char ]; do sleep 0.05; done; printf '\274y\377'")
    first = w.get_command_output(started)
    while not first.stdout:
        first = w.get_command_output(started, wait=0.05)
    assert first.stdout == "x"
    w.write_file("char", b"")
    rest = w.get_command_output(started, wait=True, since=first)
    assert (rest.stdout, rest.stdout_bytes) == ("üy\udcff", b"\xc3\xbcy\xff")
    w.execute_command("rm char")


def it_tells_a_long_output_piece_by_piece(w: Workspace) -> None:
    started = w.start_command("seq 2500000")
    told = [w.get_command_output(started, wait=True)]
    while told[-1].truncated:
        told.append(w.get_command_output(started, wait=True, since=told[-1]))
    assert len(told) == 3
    assert "".join(one.stdout for one in told) == "".join(f"{n}\n" for n in range(1, 2500001))


def it_stops_a_started_command_and_all_that_it_started(w: Workspace) -> None:
    started = w.start_command(f"trap '' TERM; echo on; {_SCATTERED.format(984)}")
    while not w.get_command_output(started, wait=0.05).stdout:
        continue
    w.stop_command(started)
    ended = w.get_command_output(started)
    assert (ended.is_running, ended.timeout_occurred) == (False, False)
    assert ended.exit_code == -9
    assert _sleepers(w, 984) == 0
    w.stop_command(started)


def it_ends_a_started_command_when_its_time_is_over(w: Workspace) -> None:
    started = w.start_command("echo before; setsid sleep 983 & sleep 983", timeout=0.5)
    ended = w.get_command_output(started, wait=20)
    assert (ended.exit_code, ended.timeout_occurred, ended.stdout) == (-1, True, "before\n")
    assert _sleepers(w, 983) == 0


def it_waits_no_longer_than_asked(w: Workspace) -> None:
    started = w.start_command("sleep 982")
    began_s = time.monotonic()
    assert w.get_command_output(started, wait=0.3).is_running
    assert 0.3 <= time.monotonic() - began_s < 5
    w.stop_command(started)


def it_says_that_it_knows_no_such_command(w: Workspace) -> None:
    for unknown in (uuid.uuid4().hex, str(uuid.uuid4()), "../../etc/passwd", "x; touch /tmp/x", ""):
        for call in (w.get_command_output, w.stop_command, lambda c: w.get_command_output(c, wait=True)):
            try:
                call(unknown)
            except UnknownCommandError as error:
                assert error.command_id == unknown
            else:
                raise AssertionError(f"it knows {unknown!r}")


def _git(where: Path, *words: str) -> str:
    argv = ["git", "-C", str(where), "-c", "user.name=n", "-c", "user.email=e@x", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def _repository(w: Workspace) -> Iterator[Path]:
    """A repository with a commit and all kinds of changes, made here and put into the workspace as `repo`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "repo")
        (root / "dir").mkdir(parents=True)
        _git(root, "init", "-q")
        before = {"moved": b"".join(b"%d\n" % n for n in range(50)), "binary": b"a\0b", "two words": b"x\n"}
        for name, content in (before | {"gone": b"bye\n", "mode": b"#!/bin/sh\r\n"}).items():
            (root / name).write_bytes(content)
        (root / "link").symlink_to("moved")
        _git(root, "add", ".")
        _git(root, "commit", "-qm", "first")
        (root / "moved").rename(root / "now\there")
        (root / "gone").unlink()
        (root / "link").unlink()
        (root / "link").symlink_to("nowhere")
        (root / "mode").chmod(0o755)
        after = {"binary": b"c\0d\xff", "two words": b"y\n", 'dir/ü "q"': b"new\n", "newbinary": b"\xff\0"}
        for name, content in (after | {".gitignore": b"ignored\n", "ignored": b"z\n"}).items():
            (root / name).write_bytes(content)
        w.file_upload(root, "repo")
        try:
            yield root
        finally:
            w.execute_command("rm -rf repo")


def it_lists_what_changed_in_a_repository_whatever_its_name(w: Workspace) -> None:
    with _repository(w):
        assert {change.path: change.status for change in w.git_changes("repo")} == {
            "moved": "DELETED",
            "now\there": "ADDED",
            "binary": "UPDATED",
            "two words": "UPDATED",
            "gone": "DELETED",
            "mode": "UPDATED",
            "link": "UPDATED",
            'dir/ü "q"': "ADDED",
            "newbinary": "ADDED",
            ".gitignore": "ADDED",
        }
    assert w.git_changes("/") == []


def it_shows_a_file_before_and_after(w: Workspace) -> None:
    with _repository(w):
        changed = w.git_diff("repo/two words")
        assert (changed.original, changed.modified) == ("x", "y")
        gone = w.git_diff("repo/gone")
        assert (gone.original, gone.modified) == ("bye", "")
        assert w.git_diff("repo/newbinary").modified == ""
        assert w.git_diff("repo/binary").original == "a\0b"


def it_gives_a_patch_that_makes_the_same_tree_in_a_fresh_clone(w: Workspace) -> None:
    with _repository(w) as root:
        w.execute_command("head -c 3000000 /dev/urandom >repo/large")
        patch = w.patch("repo/dir")
        w.file_download("repo/large", root / "large")
        clone = root.parent / "clone"
        _git(root, "clone", "-q", str(root), str(clone))
        (root.parent / "patch").write_bytes(patch)
        _git(clone, "apply", "--index", "../patch")
        _git(root, "add", "-A")
        assert _git(clone, "write-tree") == _git(root, "write-tree")
        assert w.git_changes("repo")  # its own index is as it was
    for nowhere in ("/", "/does/not/exist"):
        try:
            w.patch(nowhere)
        except GitError as error:
            assert error.path == nowhere
        else:
            raise AssertionError("a patch of no repository")


BEHAVIOURS = {
    name: value for name, value in dict(globals()).items() if name.startswith(("it_", "its_")) and callable(value)
}


def main(options: dict[str, object]) -> None:
    if isinstance(options.get("slurm"), dict):
        options["slurm"] = SlurmOptions(**options["slurm"])  # type: ignore[arg-type]
    with ApptainerWorkspace(**options) as w:
        for name, behaviour in BEHAVIOURS.items():
            try:
                behaviour(w)
                wrong = None
            except Exception:  # noqa: BLE001 - told to the test that reads the line
                wrong = traceback.format_exc()
            print(json.dumps({"name": name, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
