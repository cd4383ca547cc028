"""Brings the host of a session into a workspace, and a connection to it through the door.

The host goes there as the text of an ordinary command, one for both servers: nothing of it need be in the image but,
where OpenHands' server runs, a Python. Where it listens and its token come back in that command's output, which only
those can read who have the agent server's key. No secret is in an argv, in an environment or in a file.
"""

from __future__ import annotations

import base64
import json
import posixpath
import shlex
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from hpc_workspace import clock
from hpc_workspace.connect.streams import EXCHANGE_TIMEOUT_S, Stream
from hpc_workspace.errors import CommandError, PrerequisiteError, TunnelError, TunnelLostError, WorkspaceError
from hpc_workspace.exchange import Wish
from hpc_workspace.interactive import frames
from hpc_workspace.interactive.session import Explain, Session
from hpc_workspace.mux.frames import printable
from hpc_workspace.record import Record
from hpc_workspace.results import CommandResult
from hpc_workspace.server.layout import python_argv

_START_TIMEOUT_S = 30.0
# Where the node program lets the toolbox be seen in a container of the bundled server's.
_TOOLBOX = "/.hw"
_NO_PYTHON = 127
_MODULES = ("frames", "host")
# Each module is given as its own text, under its own name; the last one is the program.
_BOOTSTRAP = """\
import base64, json, sys, types, zlib
for _name, _text in json.loads(zlib.decompress(base64.b64decode({packed!r}))):
    _module = sys.modules[_name] = types.ModuleType(_name)
    setattr(sys.modules.setdefault({package!r}, types.ModuleType({package!r})), _name.rpartition(".")[2], _module)
    exec(compile(_text, _name, "exec"), _module.__dict__)
_module.main()
"""


class Execute(Protocol):
    """Runs a shell command in the workspace to its end, as `client.commands.Commands.execute` does."""

    def __call__(
        self, command: str, /, *, cwd: str | None, timeout_s: float, env: dict[str, str] | None
    ) -> CommandResult: ...


class Dial(Protocol):
    """Gives a new stream to what is wished for, as `link.Link.dial` does."""

    def __call__(self, wish: Wish, call_began_s: float = ..., /) -> Stream: ...


def open_session(
    command: str | None,
    *,
    cwd: str | None,
    env: Mapping[str, str] | None,
    terminal: tuple[int, int] | None,
    shell: str | None,
    record: Record,
    execute: Execute,
    dial: Dial,
    explain: Explain,
) -> Session:
    """A new session; what it is and what can go wrong is said at `Workspace.open_session`.

    Args:
        record: of the workspace that it is in.
        explain: what it was that broke a connection.
    """
    began_s = clock.now_s()
    wish = {
        "command": command,
        "shell": shell,
        "cwd": posixpath.join(record.working_dir, cwd) if cwd else record.working_dir,
        "env": dict(env or {}),
        "terminal": terminal,
    }
    try:
        said = frames.build_frame(frames.START, json.dumps(wish).encode())
    except frames.FrameError as error:
        raise CommandError("The command is too long.", command=command or "", evidence=str(error)) from error
    port, token = _start_host(record, execute)
    stream = dial(Wish(want="port", port=port), began_s)
    try:
        stream.settimeout(EXCHANGE_TIMEOUT_S)
        stream.sendall(token.encode() + said)
        rest = _wait_started(stream, command or shell or "a shell")
        stream.settimeout(None)
    except BaseException as error:
        stream.close()
        if isinstance(error, OSError) and not isinstance(error, WorkspaceError):
            lost = TunnelLostError(
                "The connection to a new session broke.", node=record.node, evidence=str(error) or type(error).__name__
            )
            raise explain(lost, began_s) from error
        raise
    return Session(stream, rest, node=record.node, explain=explain)


def _start_host(record: Record, execute: Execute) -> tuple[int, str]:
    """Start the host in the workspace; gives its port and its token.

    Raises:
        PrerequisiteError: there is no Python in the image that could run it.
        CommandError: it did not start.
    """
    ended = execute(build_host_command(record), cwd="/", timeout_s=_START_TIMEOUT_S, env=None)
    evidence = printable(ended.stderr.encode("utf-8", "replace"))
    if ended.exit_code == _NO_PYTHON and record.server == "image":
        raise PrerequisiteError(
            "The image has no python3, which an interactive session needs beside an image's own agent server.",
            evidence=evidence,
            remedy="Put Python 3.8 or later into the image; or use image=, which brings one along.",
        )
    try:
        told = json.loads(ended.stdout)
        return int(told["port"]), str(told["token"])
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"An interactive session did not start in {record.workspace_id}.",
            command="(the host of the session)",
            evidence=evidence or f"It ended with {ended.exit_code}.",
            remedy="An interactive session needs Python 3.8 or later in the image." if record.server == "image" else "",
        ) from error


def build_host_command(record: Record) -> str:
    """The line of shell that starts the host: the interpreter that is there reads it from a here-document."""
    package = "hpc_workspace.interactive"
    texts = [(f"{package}.{name}", Path(__file__).with_name(f"{name}.py").read_text()) for name in _MODULES]
    packed = base64.b64encode(zlib.compress(json.dumps(texts).encode(), 9)).decode()
    program = _BOOTSTRAP.format(packed=packed, package=package)
    if record.server == "image":
        start = f'python=$(command -v python3) || exit {_NO_PYTHON}\nexec "$python" -I -S -B'
    else:
        start = f"exec {shlex.join(_python_argv(record))}"
    # The C locale of a container is no reason to take text for anything but UTF-8.
    return f"{start} -X utf8 - <<'END'\n{program}END\n"


def _python_argv(record: Record) -> list[str]:
    """The bundled server's own interpreter."""
    return [record.python, "-I", "-S", "-B"] if record.runtime == "process" else python_argv(_TOOLBOX)


def _wait_started(stream: Stream, what: str) -> bytes:
    """Wait until the program runs; gives what came after that.

    Raises:
        CommandError: it can't be started.
        TunnelError, ServerError: the door or the host could not be reached.
        OSError: the connection broke.
    """
    received = b""
    head = len(frames.build_frame(frames.STARTED))
    while True:
        data = stream.recv(frames.DATA_MAX_BYTES)
        received += data
        try:
            found = frames.Decoder().feed(received)
        except frames.FrameError as error:
            raise TunnelError("A new session does not speak as it should.", evidence=str(error)) from error
        if found and found[0][0] == frames.FAILED:
            raise CommandError(
                "The program of a session could not be started.", command=what, evidence=printable(found[0][1])
            )
        if found:
            return received[head:]
        if not data:
            raise ConnectionResetError("the host of the session ended")
