"""From argv to a listening server, and its quick end. Everything here is for a start in a fraction of a second."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hpc_workspace.server import layout
from hpc_workspace.server.settings import Settings, SettingsError, command_environment, load_settings

_KEEP_ALIVE_S = 60  # the door is in front, and its clients give up idle connections first
_BACKLOG = 512
_STOP_S = 0.3
# Where Apptainer and Singularity put what `run` runs.
_RUNSCRIPT = Path("/.singularity.d/runscript")


def main(argv: list[str], *, toolbox: str | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns 2, with one line on stderr, when it can't start.

    Args:
        toolbox: the root of the toolbox that this runs from, in a container; None where there is none.
    """
    arguments = _parse(argv)
    os.umask(0o077)
    try:
        settings = load_settings(dict(os.environ), toolbox)
        listener = _bind_unix(arguments.uds) if arguments.uds else _bind_tcp(arguments.port)
    except (SettingsError, OSError) as error:
        print(f"hpc_workspace.server: {error}", file=sys.stderr)
        return 2
    _make_working_dir(Path(settings.working_dir))
    return _serve(settings, listener, arguments.uds)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hpc_workspace.server", description="The bundled agent server.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uds", metavar="PATH", help="listen on this Unix socket, mode 0600")
    where.add_argument("--port", type=int, metavar="N", help="listen on this port of 127.0.0.1")
    return parser.parse_args(argv)


def _bind_unix(path: str) -> socket.socket:
    """The socket, made under umask 077: at no moment could a stranger connect (uvicorn's own would be 0666)."""
    with contextlib.suppress(FileNotFoundError):
        if Path(path).is_socket():
            Path(path).unlink()  # left by a server that was killed; a live one's directory is its own
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    return listener


def _bind_tcp(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


def _make_working_dir(path: Path) -> None:
    try:
        missing = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        if missing:
            path.chmod(0o755)
    except OSError as error:  # commands that name a cwd still work; the others say that it is missing
        print(f"hpc_workspace.server: {path} can't be made: {error.strerror}", file=sys.stderr)


def _serve(settings: Settings, listener: socket.socket, uds: str | None) -> NoReturn:
    asyncio.run(_serve_until_signal(settings, listener))
    if uds:
        Path(uds).unlink(missing_ok=True)
    sys.stderr.flush()
    # Threads may be in a read from a slow disk; nobody waits for what they bring.
    os._exit(0)


async def _serve_until_signal(settings: Settings, listener: socket.socket) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    base = command_environment(settings)
    entrypoint = _begin_entrypoint(settings, base)
    if entrypoint is None:
        listener.listen(_BACKLOG)  # who connects now waits, instead of asking again and again
    else:
        await asyncio.sleep(0)  # it is started, and goes on while the rest is imported

    import uvicorn

    from hpc_workspace.server import uploads
    from hpc_workspace.server.app import build_app
    from hpc_workspace.server.table import CommandTable

    environment = base if entrypoint is None else await _result_unless(stop, entrypoint, base)

    class QuickServer(uvicorn.Server):
        """Without uvicorn's polling for its end, its waiting for connections, and its signal handlers."""

        async def main_loop(self) -> None:
            await self.on_tick(0)  # sets the default headers
            await stop.wait()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            uploads.discard_all()
            await table.end_all(grace_s=_STOP_S)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    table = CommandTable(settings, environment)
    config = uvicorn.Config(
        build_app(settings, table),
        loop="asyncio",
        ws=_websocket_protocol,  # type: ignore[arg-type]  # a factory: uvicorn only calls it
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        backlog=_BACKLOG,
    )
    await QuickServer(config).serve(sockets=[listener])


def _begin_entrypoint(settings: Settings, base: dict[str, str]) -> asyncio.Task[dict[str, str]] | None:
    """What will give `base` as the image's entrypoint changes it; None where there is no entrypoint to run."""
    if settings.toolbox is None or not _RUNSCRIPT.exists():
        return None
    from hpc_workspace.server.entrypoint import environment_after, find_entrypoint

    words = find_entrypoint(_RUNSCRIPT, base.get("PATH", os.defpath))
    if not words:
        return None
    dump_argv = [*layout.python_argv(settings.toolbox), str(Path(__file__).with_name("dump_environment.py"))]
    return asyncio.create_task(
        environment_after(words, base, cwd=settings.working_dir, folder=settings.spool_dir, dump_argv=dump_argv)
    )


async def _result_unless(
    stop: asyncio.Event, running: asyncio.Task[dict[str, str]], otherwise: dict[str, str]
) -> dict[str, str]:
    """The task's result; `otherwise`, and the task is cancelled, where `stop` is set first."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if running.done():
        return running.result()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return otherwise


def _websocket_protocol(**options: Any) -> asyncio.Protocol:
    """uvicorn's WebSocket protocol, imported when the first one is opened."""
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    return WebSocketsSansIOProtocol(**options)
