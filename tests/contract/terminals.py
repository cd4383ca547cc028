"""What every interactive session does, whatever its workspace runs in: one function a claim, each taking an open workspace.

Imports nothing but the package, so that it also runs on the nodes of the test cluster, as `behaviours.py` does. The
command line is driven by a terminal of its own; what is waited for is always its output.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback
from collections.abc import Callable

from hpc_workspace import ApptainerWorkspace, SlurmOptions, Workspace
from hpc_workspace.errors import CommandError, TunnelError
from hpc_workspace.interactive import Session

CLI = [sys.executable, "-m", "hpc_workspace.cli"]
TIMEOUT_S = 30.0


class Terminal:
    """A terminal with the command line on it, as leader of a session of its own."""

    def __init__(self, *arguments: str, rows: int = 41, columns: int = 99) -> None:
        self._ours, self._theirs = pty.openpty()
        self.resize(rows, columns)
        self._before = termios.tcgetattr(self._theirs)
        self._seen = b""
        # A session's leader that opens a terminal is in its hands from then on.
        open_it = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self._theirs)]
        self.process = subprocess.Popen(
            [*open_it, *CLI, *arguments], env=os.environ | {"TERM": "xterm-mine"}, start_new_session=True
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def read_until(self, wanted: bytes) -> bytes:
        """What was shown up to `wanted`; the next call begins after it."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while wanted not in self._seen:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"{wanted!r} was not shown, but {self._seen!r}"
            self._seen += os.read(self._ours, 65536)
        shown, found, self._seen = self._seen.partition(wanted)
        return shown + found

    def run(self, line: bytes, wanted: bytes) -> bytes:
        """Type a line of shell, and wait for what it prints; that may not be what the terminal echoes of it."""
        self.type(line + b"\r")
        return self.read_until(wanted)

    def wait_ready(self) -> None:
        self.run(b"echo rea''dy", b"ready\r\n")

    def wait(self) -> tuple[int, bool]:
        """The exit code, and whether the terminal is as it was."""
        code = self.process.wait(TIMEOUT_S)
        return code, termios.tcgetattr(self._theirs) == self._before


def _run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*CLI, *arguments], input=stdin, capture_output=True, timeout=60, check=False)


def _shown(session: Session, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        chunk = session.receive(TIMEOUT_S)
        assert chunk is not None, f"it ended with {seen!r}"
        seen += chunk.data
    return seen


def _count(w: Workspace, argv: str) -> int:
    """How many processes in the workspace have this command line."""
    look = f"for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null | grep -cx '{argv} '"
    return int(w.execute_command(look).stdout)


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline_s, "it never became so"


def it_passes_stdin_on_byte_for_byte_and_its_end(w: Workspace) -> None:
    data = bytes(range(256)) * 20_000
    with w.open_session("sha256sum") as session:
        session.send(data)
        session.end_input()
        said = b"".join(chunk.data for chunk in session)
    assert said.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert session.exit_code == 0


def it_brings_every_byte_of_a_large_output(w: Workspace) -> None:
    with w.open_session("seq 2000000; exit 5") as session:
        digest = hashlib.sha256()
        for chunk in session:
            digest.update(chunk.data)
    assert digest.hexdigest() == hashlib.sha256(b"".join(b"%d\n" % n for n in range(1, 2000001))).hexdigest()
    assert session.exit_code == 5


def it_keeps_a_session_s_outputs_apart(w: Workspace) -> None:
    with w.open_session("echo out; echo err >&2; exit 3") as session:
        said = {(chunk.stream, chunk.data) for chunk in session}
    assert said == {("stdout", b"out\n"), ("stderr", b"err\n")}
    assert session.exit_code == 3


def it_answers_while_the_program_runs(w: Workspace) -> None:
    with w.open_session("while read line; do echo got $line; done; exit 6") as session:
        for word in (b"one", b"two"):
            session.send(word + b"\n")
            assert _shown(session, b"\n") == b"got " + word + b"\n"
        session.end_input()
        assert session.receive(TIMEOUT_S) is None
    assert session.exit_code == 6


def it_starts_in_the_working_dir_with_the_environment_that_is_asked_for(w: Workspace) -> None:
    value = "a b'c\"d$e\nü"
    with w.open_session('pwd; printf %s "$X"', env={"X": value}) as session:
        assert b"".join(chunk.data for chunk in session).decode() == f"{w.working_dir}\n{value}"
    with w.open_session("pwd", "/") as session:
        assert b"".join(chunk.data for chunk in session) == b"/\n"


def its_environment_is_that_of_commands(w: Workspace) -> None:
    # What a shell sets by itself, and where it was started, may differ.
    names = "env | sed 's/=.*//' | grep -v -x -e _ -e SHLVL -e OLDPWD -e PWD | sort"
    with w.open_session(names) as session:
        assert b"".join(chunk.data for chunk in session).decode() == w.execute_command(names).stdout


def its_terminal_has_the_size_that_it_is_given(w: Workspace) -> None:
    line = "stty size; echo $TERM; read x; stty size; cat"
    with w.open_session(line, terminal=(33, 101), env={"TERM": "xterm"}) as session:
        _shown(session, b"33 101\r\nxterm\r\n")
        session.resize(20, 70)
        session.send(b"\r")
        _shown(session, b"20 70\r\n")
        session.end_input()
        while session.receive(TIMEOUT_S) is not None:
            continue
    assert session.exit_code == 0


def it_signals_the_program_and_tells_by_which_signal_it_ended(w: Workspace) -> None:
    with w.open_session("trap 'echo caught' USR1; echo up; read x; read x; kill -9 $$") as session:
        _shown(session, b"up\n")
        session.send_signal(signal.SIGUSR1)
        _shown(session, b"caught\n")
        session.end_input()
        assert session.receive(TIMEOUT_S) is None
    assert session.exit_code == -9


def it_says_that_the_program_reads_no_more(w: Workspace) -> None:
    with w.open_session("exec <&-; echo closed; exec sleep 5301") as session:
        _shown(session, b"closed\n")
        try:
            while True:
                session.send(b"x" * 65536)
        except BrokenPipeError:
            return


def it_does_not_wait_for_a_background_child_that_holds_its_output(w: Workspace) -> None:
    with w.open_session("sleep 5302 & echo done") as session:
        assert _shown(session, b"\n") == b"done\n"
        assert session.receive(TIMEOUT_S) is None
    assert session.exit_code == 0


def it_leaves_nothing_running_when_the_program_has_ended(w: Workspace) -> None:
    with w.open_session("sleep 5303 & (trap '' HUP TERM; exec setsid sleep 5303) & echo up; read x") as session:
        _shown(session, b"up\n")
        _wait_until(lambda: _count(w, "sleep 5303") == 2)
        session.send(b"\n")
        assert session.receive(TIMEOUT_S) is None
        assert _count(w, "sleep 5303") == 0


def it_leaves_nothing_running_when_it_is_closed(w: Workspace) -> None:
    with w.open_session("sleep 5304 & (trap '' HUP TERM; exec setsid sleep 5304) & echo up; read x") as session:
        _shown(session, b"up\n")
        _wait_until(lambda: _count(w, "sleep 5304") == 2)
    _wait_until(lambda: _count(w, "sleep 5304") == 0)


def it_does_not_grow_with_what_goes_through_it(w: Workspace) -> None:
    # The parent of the shell is the session's host.
    peak = "sed -n 's/^VmHWM:[^0-9]*//p' /proc/$PPID/status >&2"
    with w.open_session(f"head -c 50000000 /dev/zero; head -c 50000000 >/dev/null; {peak}") as session:
        sizes = {"stdout": 0, "stderr": 0}
        said = b""
        for chunk in session:
            sizes[chunk.stream] += len(chunk.data)
            if chunk.stream == "stderr":
                said += chunk.data
            elif sizes["stdout"] == 50_000_000:
                for _ in range(50):
                    session.send(bytes(1_000_000))
    assert sizes["stdout"] == 50_000_000
    assert int(said.split()[0]) < 48 * 1024, f"{said!r}"


def it_says_why_a_program_can_not_be_started(w: Workspace) -> None:
    for options in ({"cwd": "/not there"}, {"shell": "/not there"}):
        try:
            w.open_session("true", **options)
        except CommandError as error:
            assert error.evidence == "/not there: No such file or directory"
        else:
            raise AssertionError("it was started")


def it_says_that_a_session_is_lost_and_ends_what_ran_in_it(w: Workspace) -> None:
    with w.open_session("sleep 5305 & echo up; read x; kill -9 $PPID; read x", terminal=(24, 80)) as session:
        _shown(session, b"up\r\n")
        session.send(b"\r")
        try:
            while session.receive(TIMEOUT_S) is not None:
                continue
        except TunnelError as error:
            assert "lost" in str(error)
        else:
            raise AssertionError("it ended in order")
    _wait_until(lambda: _count(w, "sleep 5305") == 0)


def the_shell_is_on_a_terminal_like_ours(w: Workspace) -> None:
    with Terminal("shell", w.id) as terminal:
        terminal.wait_ready()
        terminal.run(b"stty size; echo $TERM; pwd", b"41 99\r\nxterm-mine\r\n" + w.working_dir.encode() + b"\r\n")
        terminal.resize(50, 120)
        terminal.run(b"until [ \"$(stty size)\" = '50 120' ]; do :; done; echo res''ized", b"resized\r\n")
        terminal.run(b"printf '\\303\\274\\n'", "ü\r\n".encode())
        terminal.type(b"exit 7\r")
        assert terminal.wait() == (7, True)


def ctrl_c_and_ctrl_z_are_the_program_s(w: Workspace) -> None:
    with Terminal("shell", w.id) as terminal:
        terminal.wait_ready()
        terminal.run(b"sh -c 'echo u\"\"p; exec sleep 5306'", b"up\r\n")
        terminal.type(b"\x03")
        terminal.run(b"echo code $?", b"code 130\r\n")
        terminal.run(b"sh -c 'echo u\"\"p; exec sleep 5307'", b"up\r\n")
        terminal.type(b"\x1a")
        terminal.read_until(b"Stopped")
        terminal.run(b"jobs | tr a-z A-Z", b"EXEC SLEEP 5307")
        terminal.type(b"exec true\r")
        assert terminal.wait() == (0, True)


def ctrl_d_ends_the_shell(w: Workspace) -> None:
    with Terminal("shell", w.id, "--shell", "sh", "--cwd", "/") as terminal:
        terminal.run(b"echo in $(pwd)", b"in /\r\n")
        terminal.type(b"\x04")
        assert terminal.wait() == (0, True)


def a_command_has_the_shell_s_terminal_and_its_code_comes_back(w: Workspace) -> None:
    with Terminal("shell", w.id, "--", "tty; kill -TERM $$") as terminal:
        terminal.read_until(b"/dev/pts/")
        assert terminal.wait() == (128 + signal.SIGTERM, True)


def enter_tilde_dot_leaves(w: Workspace) -> None:
    with Terminal("shell", w.id, "--", "stty -echo; echo up; cat; sleep 5308") as terminal:
        terminal.read_until(b"up\r\n")
        terminal.type(b"x~.\r~~\r")  # neither is it
        terminal.read_until(b"x~.\r\n~\r\n")
        terminal.type(b"~.")
        terminal.read_until(b"\r\nhpc-workspace: left the session\r\n")
        assert terminal.wait() == (255, True)


def a_signal_to_the_command_line_leaves_the_terminal_as_it_was(w: Workspace) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        with Terminal("shell", w.id) as terminal:
            terminal.wait_ready()
            terminal.process.send_signal(number)
            assert terminal.wait() == (128 + number, True)


def a_command_line_that_is_killed_leaves_nothing_running(w: Workspace) -> None:
    with Terminal("shell", w.id) as terminal:
        terminal.wait_ready()
        terminal.run(b"nohup sleep 5310 >/dev/null 2>&1 & sh -c 'echo u\"\"p; exec sleep 5310'", b"up\r\n")
        _wait_until(lambda: _count(w, "sleep 5310") == 2)
        terminal.process.kill()
        _wait_until(lambda: _count(w, "sleep 5310") == 0)


def a_lost_session_is_told_in_a_line(w: Workspace) -> None:
    with Terminal("shell", w.id) as terminal:
        terminal.wait_ready()
        terminal.type(b"kill -9 $PPID\r")
        terminal.read_until(b"\r\nhpc-workspace: The connection to a session")
        assert terminal.wait() == (255, True)


def exec_passes_stdin_on_and_keeps_the_outputs_apart(w: Workspace) -> None:
    data = bytes(range(256)) * 1000
    ended = _run("exec", "-i", w.id, "--", "cat; echo err >&2; exit 5", stdin=data)
    assert (ended.stdout, ended.stderr, ended.returncode) == (data, b"err\n", 5)


def exec_without_i_has_an_empty_stdin(w: Workspace) -> None:
    ended = _run("exec", w.id, "--cwd", "/", "--", "pwd; cat; kill -9 $$", stdin=b"not for it")
    assert (ended.stdout, ended.stderr, ended.returncode) == (b"/\n", b"", 128 + 9)


def exec_ends_quietly_when_nobody_reads_on(w: Workspace) -> None:
    argv = [*CLI, "exec", "-i", w.id, "yes"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"y\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE


def exec_ends_when_the_program_does_whatever_is_left_on_stdin(w: Workspace) -> None:
    reading, writing = os.pipe()
    with subprocess.Popen([*CLI, "exec", "-i", w.id, "head -n 1"], stdin=reading, stdout=subprocess.PIPE) as process:
        os.close(reading)
        os.write(writing, b"one\ntwo\n")
        assert process.communicate(timeout=TIMEOUT_S)[0] == b"one\n"
        assert process.returncode == 0
    os.close(writing)


def exec_passes_an_interrupt_on(w: Workspace) -> None:
    argv = [*CLI, "exec", "-i", w.id, "trap 'echo caught; exit 9' INT; echo up; read x; read x"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"caught\n"
        assert process.wait(TIMEOUT_S) == 9


def exec_ends_a_command_at_its_timeout(w: Workspace) -> None:
    ended = _run("exec", "-i", "--timeout", "0.5", w.id, "echo up; exec sleep 5309")
    assert ended.stdout == b"up\n"
    assert ended.stderr == b"hpc-workspace: the command ran longer than its --timeout\n"
    assert ended.returncode == 124
    _wait_until(lambda: _count(w, "sleep 5309") == 0)


def exec_it_runs_it_on_this_terminal(w: Workspace) -> None:
    with Terminal("exec", "-it", w.id, "--", "stty size; read x; echo got $x; exit 4") as terminal:
        terminal.read_until(b"41 99\r\n")
        terminal.type(b"this\r")
        terminal.read_until(b"got this\r\n")
        assert terminal.wait() == (4, True)


def without_a_terminal_the_shell_reads_commands_from_stdin(w: Workspace) -> None:
    ended = _run("shell", w.id, stdin=b"tty; echo out; echo err >&2; exit 6\n")
    assert (ended.stdout, ended.stderr, ended.returncode) == (b"not a tty\nout\n", b"err\n", 6)
    ended = _run("exec", "-it", w.id, "true")
    assert ended.returncode == 2
    assert b"-it needs a terminal" in ended.stderr


CLAIMS = {
    name: value
    for name, value in dict(globals()).items()
    if callable(value) and name.split("_")[0] in ("it", "its", "the", "ctrl", "a", "enter", "exec", "without")
}


def main(options: dict[str, object], names: list[str]) -> None:
    if isinstance(options.get("slurm"), dict):
        options["slurm"] = SlurmOptions(**options["slurm"])  # type: ignore[arg-type]
    with ApptainerWorkspace(**options) as w:
        for name in names:
            try:
                CLAIMS[name](w)
                wrong = None
            except Exception:  # noqa: BLE001 - told to the test that reads the line
                wrong = traceback.format_exc()
            print(json.dumps({"name": name, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
