"""The end of an interactive session that is in the workspace: it holds the program, on a pty or on pipes.

It listens on a port of 127.0.0.1, which the door relays to; says on stdout, which only those read who have the agent
server's key, which port that is and the token that a client has to begin with; lets one client in; and ends, with all
that it started, when the program has ended or the client is gone. Without a client it ends soon.

Runs as text that is given to whatever Python is there: 3.8 or later, nothing but the standard library, no file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hmac
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import termios
import time

from hpc_workspace.interactive import frames

# How long a client may take to come and to prove itself. It is told the port in an answer, and then comes.
_CLIENT_WITHIN_S = 30.0
# Strangers on the node can reach the port; they can't fill it: who came first of those that said nothing has to go.
_UNPROVEN_MAX = 64
# A client that is stopped, or behind a link that is down, is waited for; one whose machine is gone says nothing at all.
_SILENCE_MAX_S = 600.0
# Output that comes within this time of the program's end still counts, as with the bundled server's commands.
_DRAIN_S = 0.05
# More than this can't have been in its pipes: it comes from a background child that goes on and on.
_DRAIN_BYTES = 1024 * 1024
_GRACE_S = 1.0
_KILL_S = 2.0
_GOODBYE_S = 5.0
_LOOK_S = 0.02
_READ_BYTES = 64 * 1024
# prctl(2), include/uapi/linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
# termios(3); Python has no name for it. The kernel's own editing of a line then knows characters of several bytes.
_IUTF8 = 0o040000
# What the shell that started this has set for itself.
_SHELLS_OWN = ("_", "OLDPWD", "PWD", "SHLVL")


class StartError(Exception):
    """The program can't be started; the text says why."""


def main() -> None:
    """Say where this listens, and go on in the background."""
    token = os.urandom(frames.TOKEN_BYTES // 2).hex()
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(_UNPROVEN_MAX)
    if os.fork():
        sys.stdout.write(json.dumps({"port": listener.getsockname()[1], "token": token}) + "\n")
        sys.stdout.flush()
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os._exit(serve(listener, token))


def serve(listener: socket.socket, token: str, within_s: float = _CLIENT_WITHIN_S) -> int:
    """Serve one client to the end. Returns this process's exit code."""
    with listener:
        found = accept_client(listener, token.encode(), within_s)
    if found is None:
        return 1
    connection, rest = found
    with connection:
        return Host(connection, rest).run()


def accept_client(listener: socket.socket, token: bytes, within_s: float) -> tuple[socket.socket, bytes] | None:
    """The first who knows the token, and what came after that. None: nobody did, in time.

    All are listened to at once: one who says nothing, or the wrong thing, keeps nobody out.
    """
    deadline_s = time.monotonic() + within_s
    listener.setblocking(False)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    unproven: dict[int, tuple[socket.socket, bytearray]] = {}  # by descriptor, the oldest first
    try:
        while (left_s := deadline_s - time.monotonic()) > 0:
            for fd, _ in poll.poll(left_s * 1000):
                if fd == listener.fileno():
                    if len(unproven) >= _UNPROVEN_MAX:
                        _turn_away(next(iter(unproven)), unproven, poll)
                    with contextlib.suppress(OSError):
                        connection = listener.accept()[0]
                        connection.setblocking(False)
                        unproven[connection.fileno()] = connection, bytearray()
                        poll.register(connection, select.POLLIN)
                elif fd in unproven:
                    connection, said = unproven[fd]
                    if not _listen_to(connection, said):
                        _turn_away(fd, unproven, poll)
                    elif len(said) >= len(token):
                        if hmac.compare_digest(bytes(said[: len(token)]), token):
                            del unproven[fd]
                            return connection, bytes(said[len(token) :])
                        _turn_away(fd, unproven, poll)
        return None
    finally:
        for connection, _ in unproven.values():
            connection.close()


def _listen_to(connection: socket.socket, said: bytearray) -> bool:
    """Add what has come. Returns whether the connection is whole."""
    try:
        data = connection.recv(_READ_BYTES)
    except BlockingIOError:
        return True
    except OSError:
        return False
    said += data
    return bool(data)


def _turn_away(fd: int, unproven: dict[int, tuple[socket.socket, bytearray]], poll: select.poll) -> None:
    poll.unregister(fd)
    unproven.pop(fd)[0].close()


class Host:
    """One session: moves bytes between the client and the program, one thread, nothing but poll(2).

    Args:
        connection: to the client, who has proven himself.
        received: what came from him already.
    """

    def __init__(self, connection: socket.socket, received: bytes = b"") -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._decoder = frames.Decoder()
        self._received = received
        self._heard_s = time.monotonic()
        self._client_is_gone = False
        self._to_client = bytearray()
        self._credit = frames.WINDOW_BYTES
        self._pid = 0
        self._code: int | None = None
        self._master: int | None = None
        # The program's stdin, and what has come for it; None once it has ended.
        self._input: int | None = None
        self._to_program = bytearray()
        self._input_ends = False
        self._passed_on = 0
        # By descriptor, what comes there: STDOUT or STDERR.
        self._outputs: dict[int, int] = {}
        self._quiet_since_s = 0.0
        self._drained = 0
        self._is_drained = False
        self._is_subreaper = False
        self._is_told_to_end = False
        self._wake, wake = os.pipe()
        for fd in (self._wake, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def run(self) -> int:
        """Serve until the program or the client has gone; leaves nothing running. Returns this process's exit code."""
        self._is_subreaper = _become_subreaper()
        try:
            self._feed(self._received)
            while not self._is_over():
                self._turn()
        except frames.FrameError:
            self._client_is_gone = True
        finally:
            self._let_go()
            self._end_all()
        if self._client_is_gone or self._is_told_to_end or self._code is None:
            return 1
        self._say(frames.EXIT, frames.build_code(self._code))
        self._part()
        return 0

    def _on_signal(self, number: int, frame: object) -> None:
        self._is_told_to_end = True

    def _is_over(self) -> bool:
        if self._client_is_gone or self._is_told_to_end:
            return True
        if time.monotonic() - self._heard_s > _SILENCE_MAX_S:
            self._client_is_gone = True
            return True
        if self._code is None:
            return False
        return not self._outputs or self._is_drained or self._drained > _DRAIN_BYTES

    def _turn(self) -> None:
        """Wait until there is something to move, and move it."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._connection, select.POLLIN | (select.POLLOUT if self._to_client else 0))
        wanted: dict[int, int] = {}
        if self._credit > 0:
            wanted = dict.fromkeys(self._outputs, select.POLLIN)
        if self._input is not None:
            # With nothing to write, a pipe whose reader is gone still says so.
            wanted[self._input] = wanted.get(self._input, 0) | (select.POLLOUT if self._to_program else 0)
            if self._input == self._master and not wanted[self._input]:
                del wanted[self._input]  # of a terminal that nobody holds any more, poll(2) would tell all the time
        for fd, events in wanted.items():
            poll.register(fd, events)
        has_ended = self._code is not None
        ready = dict(poll.poll((_DRAIN_S if has_ended else _SILENCE_MAX_S) * 1000))
        if has_ended and self._credit > 0:
            # Only who looked can say that nothing comes: while the client takes nothing, or this process has to wait
            # for its turn, time passes and says nothing.
            is_quiet = not any(fd in ready for fd in self._outputs)
            self._is_drained = is_quiet and time.monotonic() - self._quiet_since_s > _DRAIN_S
        if self._wake in ready:
            self._drain_wake()
        self._reap()
        events = ready.get(self._connection.fileno(), 0)
        if events & ~select.POLLOUT:
            self._hear()
        if self._input is not None and ready.get(self._input, 0) & ~select.POLLIN:
            self._write_input()
        for fd in [fd for fd in self._outputs if ready.get(fd, 0) & ~select.POLLOUT]:
            self._read_output(fd)
        self._send()

    def _hear(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._client_is_gone = True
            return
        self._heard_s = time.monotonic()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        for kind, payload in self._decoder.feed(data):
            if kind == frames.START:
                self._start(payload)
            elif kind == frames.INPUT:
                if self._input is None:
                    self._give_back(len(payload))
                else:
                    self._to_program += payload
                    self._write_input()
            elif kind == frames.INPUT_END:
                if self._input == self._master:
                    self._to_program += self._end_of_file_key()
                else:
                    self._input_ends = True
                self._write_input()
            elif kind == frames.RESIZE and self._master is not None:
                with contextlib.suppress(OSError):  # the terminal is gone
                    set_size(self._master, *frames.parse_size(payload))
            elif kind == frames.SIGNAL:
                self._signal_program(payload[0])
            elif kind == frames.CREDIT:
                if self._credit <= 0:
                    self._quiet_since_s = time.monotonic()
                self._credit += frames.parse_count(payload)
            elif kind == frames.PING:
                self._say(frames.PONG)

    def _start(self, payload: bytes) -> None:
        try:
            wish = json.loads(payload)
            if self._pid:
                raise StartError("it runs already")
            self._spawn(wish)
        except (StartError, OSError, ValueError) as error:
            self._say(frames.FAILED, str(error).encode("utf-8", "replace")[: frames.DATA_MAX_BYTES])
            self._part()
            self._client_is_gone = True
        else:
            self._say(frames.STARTED)

    def _spawn(self, wish: dict[str, object]) -> None:
        """Start the program that the client wants, on a terminal if it names the size of one.

        Raises:
            StartError, OSError: it can't be started.
        """
        environment = initial_environment()
        environment.update(wish["env"])  # type: ignore[call-overload]
        environment["PWD"] = str(wish["cwd"])
        argv = [str(wish["shell"]) if wish["shell"] else find_shell(environment)]
        if wish["command"] is not None:
            argv += ["-c", str(wish["command"])]
        size = wish["terminal"]
        if size is None:
            inside, ours = _make_pipes()
        else:
            self._master, slave = os.openpty()
            set_size(self._master, *size)  # type: ignore[misc]
            _know_utf8(slave)
            inside, ours = [slave] * 3, [self._master] * 2
        try:
            self._pid = start(argv, str(wish["cwd"]), environment, inside, has_terminal=size is not None)
        finally:
            for fd in set(inside):
                os.close(fd)
        for fd in ours:
            os.set_blocking(fd, False)
        self._input = ours[0]
        self._outputs = dict(zip(ours[1:], (frames.STDOUT, frames.STDERR)))  # noqa: B905 - Python 3.8
        self._quiet_since_s = time.monotonic()

    def _write_input(self) -> None:
        if self._input is None:
            return
        try:
            while self._to_program:
                count = os.write(self._input, self._to_program[:_READ_BYTES])
                del self._to_program[:count]
                self._give_back(count)
            if self._input_ends:
                self._end_input()
            elif self._input != self._master and not _has_reader(self._input):
                raise BrokenPipeError
        except BlockingIOError:
            return
        except OSError:  # it reads no more
            self._say(frames.INPUT_END)
            self._end_input()

    def _end_of_file_key(self) -> bytes:
        """What a person types who has nothing more to say."""
        try:
            return bytes(termios.tcgetattr(self._input)[6][termios.VEOF])  # type: ignore[arg-type]
        except (termios.error, TypeError):  # the terminal is gone
            return b""

    def _end_input(self) -> None:
        if self._input is not None and self._input != self._master:
            os.close(self._input)
        self._input = None
        self._give_back(len(self._to_program))
        self._to_program.clear()

    def _give_back(self, count: int) -> None:
        """Tell the client how much more it may send, in pieces that are worth a frame."""
        self._passed_on += count
        if self._passed_on >= frames.WINDOW_BYTES // 4:
            self._say(frames.CREDIT, frames.build_count(self._passed_on))
            self._passed_on = 0

    def _read_output(self, fd: int) -> None:
        if self._credit <= 0:
            return
        try:
            data = os.read(fd, min(_READ_BYTES, self._credit))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that nobody holds any more
                raise
            data = b""
        if data:
            self._credit -= len(data)
            self._say(self._outputs[fd], data)
            self._quiet_since_s = time.monotonic()
            self._drained += len(data) if self._code is not None else 0
            return
        del self._outputs[fd]
        if fd != self._master:
            os.close(fd)
        elif self._input is not None:
            self._end_input()

    def _signal_program(self, number: int) -> None:
        """Signal the group in the terminal's foreground; without a terminal, the program's own."""
        if not self._pid or self._code is not None:
            return
        group = self._pid
        with contextlib.suppress(OSError):
            if self._master is not None:
                group = os.tcgetpgrp(self._master) or group
        with contextlib.suppress(OSError, ValueError):  # it has just ended; there is no such signal
            os.killpg(group, number)

    def _say(self, kind: int, payload: bytes = b"") -> None:
        self._to_client += frames.build_frame(kind, payload)

    def _send(self) -> None:
        try:
            while self._to_client:
                count = self._connection.send(self._to_client[: 4 * _READ_BYTES])
                del self._to_client[:count]
        except BlockingIOError:
            return
        except OSError:
            self._client_is_gone = True

    def _part(self) -> None:
        """Deliver what is left to say, and wait until the client hangs up: a close now could cost it the last words."""
        deadline_s = time.monotonic() + _GOODBYE_S
        is_told = False
        while not self._client_is_gone and (left_s := deadline_s - time.monotonic()) > 0:
            self._send()
            if not self._to_client and not is_told:
                is_told = True
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_WR)
            poll = select.poll()
            poll.register(self._connection, select.POLLIN | (select.POLLOUT if self._to_client else 0))
            if poll.poll(left_s * 1000):
                with contextlib.suppress(BlockingIOError):
                    try:
                        self._client_is_gone = not self._connection.recv(_READ_BYTES)
                    except ConnectionError:
                        self._client_is_gone = True

    def _let_go(self) -> None:
        """Close the program's terminal and pipes: what still writes to them must not hang there."""
        self._end_input()
        for fd in {*self._outputs, self._master} - {None}:
            os.close(fd)  # type: ignore[arg-type]
        self._outputs = {}
        self._master = None

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake, 4096):
                continue

    def _reap(self) -> None:
        """Collect whoever of ours has ended, the program and what it left to us."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._pid:
                    self._code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                    self._quiet_since_s = time.monotonic()

    def _end_all(self) -> None:
        """End everything that descends from the program: asked first, and after a second not asked any more."""
        for numbers, within_s in (
            ((signal.SIGHUP, signal.SIGTERM, signal.SIGCONT), _GRACE_S),
            ((signal.SIGKILL,), _KILL_S),
        ):
            deadline_s = time.monotonic() + within_s
            asked: set[int] = set()
            while (left := self._find_descendants()) and time.monotonic() < deadline_s:
                for pid in left - asked if signal.SIGKILL not in numbers else left:
                    for number in numbers:
                        with contextlib.suppress(OSError):
                            os.kill(pid, number)
                asked |= left
                self._drain_wake()
                poll = select.poll()
                poll.register(self._wake, select.POLLIN)
                poll.poll(_LOOK_S * 1000)
                self._reap()
            self._reap()

    def _find_descendants(self) -> set[int]:
        """Whatever lives of the program's: what descends from this process, else what is in the program's session.

        Source: proc(5), /proc/pid/stat: the fields after the last ")" are state, ppid, pgrp, session.
        """
        if not self._pid:
            return set()
        children: dict[int, list[int]] = {}
        found = set()
        alive = set()
        try:
            names = [name for name in os.listdir("/proc") if name.isdigit()]
        except OSError:
            names = []
        if not names:  # no /proc here: macOS, say
            return {self._pid} if self._code is None else set()
        for name in names:
            try:
                with open("/proc/" + name + "/stat", "rb") as file:
                    state, parent, _, session = file.read().rpartition(b")")[2].split(maxsplit=4)[:4]
            except (OSError, ValueError):  # it ended between listing and reading
                continue
            children.setdefault(int(parent), []).append(int(name))
            if state not in (b"Z", b"X"):
                alive.add(int(name))
            if int(session) == self._pid and not self._is_subreaper:
                found.add(int(name))
        todo = [os.getpid()]
        while todo:
            born = children.get(todo.pop(), [])
            found.update(born)
            todo += born
        return (found & alive) - {os.getpid()}


def start(argv: list[str], cwd: str, environment: dict[str, str], stdio: list[int], *, has_terminal: bool) -> int:
    """Start a program as the leader of its own session, and where `stdio` is a terminal, in control of it.

    Returns its process id.

    Raises:
        StartError: the program or the directory can't be used.
    """
    said, say = os.pipe()  # closed by exec
    pid = os.fork()
    if pid == 0:
        what = argv[0]
        try:
            os.setsid()
            if has_terminal:
                fcntl.ioctl(stdio[0], termios.TIOCSCTTY, 0)
            for number, fd in enumerate(stdio):
                os.dup2(fd, number)
            signal.set_wakeup_fd(-1)
            for number in (
                signal.SIGPIPE,
                signal.SIGXFSZ,
                signal.SIGTERM,
                signal.SIGHUP,
                signal.SIGINT,
                signal.SIGCHLD,
            ):
                signal.signal(number, signal.SIG_DFL)
            what = cwd
            os.chdir(cwd)
            what = argv[0]
            os.execvpe(argv[0], argv, environment)  # noqa: S606 - what it runs is a shell
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            os.write(say, (what + ": " + reason).encode("utf-8", "replace"))
        finally:
            os._exit(127)
    os.close(say)
    with open(said, "rb") as file:
        reason = file.read()
    if reason:
        os.waitpid(pid, 0)
        raise StartError(reason.decode("utf-8", "replace"))
    return pid


def initial_environment() -> dict[str, str]:
    """What this process was started with, less what a shell sets for itself.

    `os.environ` may have an LC_CTYPE that Python added (PEP 538).
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            pairs = [os.fsdecode(entry).partition("=") for entry in file.read().split(b"\0") if b"=" in entry]
    except OSError:
        pairs = [(name, "=", value) for name, value in os.environ.items()]
    return {name: value for name, _, value in pairs if name and name not in _SHELLS_OWN}


def find_shell(environment: dict[str, str]) -> str:
    """The image's bash, else its sh."""
    path = environment.get("PATH", os.defpath)
    return shutil.which("bash", path=path) or shutil.which("bash", path=os.defpath) or "/bin/sh"


def set_size(terminal: int, rows: int, columns: int) -> None:
    """Set the size of a terminal; who is in its foreground is told (SIGWINCH)."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _know_utf8(terminal: int) -> None:
    if sys.platform.startswith("linux"):
        modes = termios.tcgetattr(terminal)
        modes[0] |= _IUTF8
        termios.tcsetattr(terminal, termios.TCSANOW, modes)


def _make_pipes() -> tuple[list[int], list[int]]:
    """Three pipes: the ends for the program, and ours, of stdin, stdout and stderr."""
    stdin, ours_in = os.pipe()
    ours_out, stdout = os.pipe()
    ours_err, stderr = os.pipe()
    return [stdin, stdout, stderr], [ours_in, ours_out, ours_err]


def _has_reader(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return not poll.poll(0)


def _become_subreaper() -> bool:
    """Let what loses its parent become ours, so that nothing of the program's can hide under PID 1. False: not here."""
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


if __name__ == "__main__":
    main()
