"""`hpc-workspace shell` and `exec`: a program in a workspace, with this process's terminal or stdin in its hands."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from hpc_workspace.cli import EXIT_INFRASTRUCTURE, EXIT_TIMEOUT
from hpc_workspace.cli.local_terminal import EscapeKeys, find_size, handling, raw_mode
from hpc_workspace.cli.output import as_line, print_stream, shell_code, write_all

if TYPE_CHECKING:
    from types import FrameType

    from hpc_workspace.interactive import Session
    from hpc_workspace.workspace import Workspace

STDIN, STDOUT, STDERR = 0, 1, 2
_READ_BYTES = 64 * 1024
_LEAVE_S = 3.0


@click.command()
@click.argument("workspace_id", metavar="ID")
@click.argument("command", nargs=-1)
@click.option("--cwd", metavar="DIR", help="Where it starts; by default the workspace's working_dir.")
@click.option("--shell", "program", metavar="PROGRAM", help="Instead of bash, or sh where there is no bash.")
def shell(workspace_id: str, command: tuple[str, ...], cwd: str | None, program: str | None) -> None:
    """A shell, or COMMAND, in the workspace ID, on a terminal like this one. Exits with its code.

    Enter ~ . leaves a session that hangs. What was started in it ends with it. Where stdin or stdout is no terminal,
    there is none inside either: the shell then reads commands from stdin.

    \b
    hpc-workspace shell ws-0a1b2c3d4e
    hpc-workspace shell ws-0a1b2c3d4e --cwd /workspace/src -- htop
    """
    has_terminal = os.isatty(STDIN) and os.isatty(STDOUT)
    line = as_line(command) if command else None
    sys.exit(run_session(workspace_id, line, cwd=cwd, shell=program, has_terminal=has_terminal, has_input=True))


@click.command(name="exec")
@click.argument("workspace_id", metavar="ID")
@click.argument("command", nargs=-1, required=True)
@click.option("-i", "has_input", is_flag=True, help="Pass stdin on to it, byte for byte, and its end.")
@click.option("-t", "has_terminal", is_flag=True, help="Run it on a terminal; with -i, this one.")
@click.option("--cwd", metavar="DIR", help="Where it starts; by default the workspace's working_dir.")
@click.option("--timeout", type=float, default=None, help="Seconds for the command; none by default.")
def exec_(
    workspace_id: str,
    command: tuple[str, ...],
    has_input: bool,
    has_terminal: bool,
    cwd: str | None,
    timeout: float | None,
) -> None:
    """Run COMMAND in the workspace ID, stdout and stderr apart, and exit with its code.

    One argument is a line of shell; several are one program with its arguments. Without -i its stdin is empty.

    \b
    hpc-workspace exec ws-0a1b2c3d4e -- python -V
    tar c src | hpc-workspace exec -i ws-0a1b2c3d4e -- tar x
    """
    line = as_line(command)
    if has_input or has_terminal:
        if has_input and has_terminal and not os.isatty(STDIN):
            raise click.UsageError("-it needs a terminal as stdin; to pass other input on, use -i alone.")
        code = run_session(
            workspace_id, line, cwd=cwd, has_input=has_input, has_terminal=has_terminal, timeout_s=timeout
        )
    else:
        code = _run_command(workspace_id, line, cwd=cwd, timeout_s=timeout)
    sys.exit(code)


def _run_command(workspace_id: str, line: str, *, cwd: str | None, timeout_s: float | None) -> int:
    from hpc_workspace.workspace import Workspace

    workspace = Workspace.attach(workspace_id)
    try:
        return print_stream(workspace.stream_command(line, cwd=cwd, timeout=timeout_s))
    finally:
        workspace.disconnect()


def run_session(
    workspace_id: str,
    line: str | None,
    *,
    cwd: str | None,
    has_input: bool,
    has_terminal: bool,
    shell: str | None = None,
    timeout_s: float | None = None,
) -> int:
    """Open a session in the workspace and be its other end until it is over. Returns this process's exit code.

    Args:
        line: of shell; None: an interactive shell.
        has_terminal: whether it runs on a terminal; with `has_input`, this process's becomes raw meanwhile.

    Raises:
        WorkspaceError: it can't be opened. One that is lost later is told here, in a line.
    """
    from hpc_workspace.workspace import Workspace

    with _ending_in_order():
        workspace = Workspace.attach(workspace_id)
        code = EXIT_INFRASTRUCTURE
        try:
            size = find_size(STDIN, STDOUT, STDERR) if has_terminal else None
            env = {"TERM": os.environ.get("TERM", "dumb")} if has_terminal else {}
            session = workspace.open_session(line, cwd, env, terminal=size, shell=shell)
            code = _Conversation(session, has_input=has_input, size=size).hold(timeout_s)
        finally:
            _leave(workspace, code)
    return code


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """A TERM or HUP ends this process by way of its `finally` blocks: they make the terminal usable again."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handling(signal.SIGTERM, end), handling(signal.SIGHUP, end):
        yield


def _leave(workspace: Workspace, code: int) -> None:
    """Let go of the workspace; where the way to it hangs, of this process too."""
    leaving = threading.Thread(target=workspace.disconnect, daemon=True)
    leaving.start()
    leaving.join(_LEAVE_S)
    if leaving.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Conversation:
    """Between a session and this process's stdin, stdout and stderr.

    Args:
        has_input: whether our stdin is for the program.
        size: of its terminal when it was opened; None: it has none.
    """

    def __init__(self, session: Session, *, has_input: bool, size: tuple[int, int] | None) -> None:
        self._session = session
        self._has_input = has_input
        self._size = size
        self._wants_to_leave = False
        self._was_interrupted = False
        self._stop, self._stopped = os.pipe()

    def hold(self, timeout_s: float | None) -> int:
        """Move bytes until the session is over. Returns the exit code for this process."""
        from hpc_workspace.errors import WorkspaceError

        said = ""
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._session.close)
                stack.callback(os.close, self._stopped)  # the end of the reading thread
                stack.enter_context(handling(signal.SIGINT, self._interrupt))
                if self._size is not None:
                    stack.enter_context(handling(signal.SIGWINCH, self._resize))
                    self._resize()
                    if self._has_input:
                        stack.enter_context(raw_mode(STDIN))
                if self._has_input:
                    threading.Thread(target=self._read_input, name="hpc-workspace-stdin", daemon=True).start()
                return self._write_output(timeout_s)
        except BrokenPipeError:  # whoever read our output has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
            return 128 + signal.SIGPIPE
        except TimeoutError:
            said, code = "the command ran longer than its --timeout", EXIT_TIMEOUT
        except WorkspaceError as error:
            code = EXIT_INFRASTRUCTURE
            said = "left the session" if self._wants_to_leave else f"{error.what} {error.evidence}".rstrip()
        line = "".join(character if character.isprintable() else " " for character in said)
        click.echo(f"{os.linesep if self._size else ''}hpc-workspace: {line}", err=True)
        return code

    def _write_output(self, timeout_s: float | None) -> int:
        from hpc_workspace import clock

        deadline = clock.Deadline(timeout_s)
        while (chunk := self._session.receive(None if timeout_s is None else deadline.left_s)) is not None:
            write_all(STDOUT if chunk.stream == "stdout" else STDERR, chunk.data)
            if deadline.is_over:
                raise TimeoutError
        code = self._session.exit_code
        assert code is not None
        return shell_code(code)

    def _read_input(self) -> None:
        """Give what comes on stdin to the program, until either has no more of it."""
        from hpc_workspace.errors import WorkspaceError

        escape = EscapeKeys() if self._size is not None else None
        with contextlib.suppress(BrokenPipeError, WorkspaceError):
            while (data := self._read_stdin()) is not None:
                if escape is not None:
                    data, self._wants_to_leave = escape.feed(data)
                if self._wants_to_leave:
                    self._session.close()
                    return
                self._session.send(data)
            self._session.end_input()

    def _read_stdin(self) -> bytes | None:
        """What comes next; None at its end, or when nobody wants it any more."""
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        with contextlib.suppress(OSError):
            poll.register(STDIN, select.POLLIN)
            if self._stop in dict(poll.poll()):
                return None
            return os.read(STDIN, _READ_BYTES) or None
        return None  # it is closed, or its terminal is gone

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C is the program's; who presses it again wants to get away."""
        if self._was_interrupted:
            raise SystemExit(128 + number)
        self._was_interrupted = True
        self._session.send_signal(number)

    def _resize(self, *_: object) -> None:
        if (size := find_size(STDIN, STDOUT, STDERR)) != self._size:
            self._size = size
            self._session.resize(*size)
