"""What every workspace does, whatever it runs in: one function a claim, each taking an open workspace.

Imports nothing but the package, so that it also runs on the nodes of the test cluster:

    python behaviours.py '{"image": "/shared/images/tiny.sif"}'

prints one line of JSON a claim: its name, and what went wrong, or null.
"""

from __future__ import annotations

import contextlib
import http.server
import json
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

from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace
from hpc_workspace.errors import CommandError, UnknownCommandError
from hpc_workspace.results import CommandResult, OutputChunk


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
    started = w.start_command(f"echo on; {_SCATTERED.format(984)}")
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
