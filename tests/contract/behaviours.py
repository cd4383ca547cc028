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
import sys
import tempfile
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace
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


def it_ends_what_a_timed_out_command_started(w: Workspace) -> None:
    w.execute_command("sleep 987 & sleep 987", timeout=1)
    left = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; done 2>/dev/null | grep -c 'sleep 98[7]'"
    assert w.execute_command(left).stdout.strip() == "0"


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
