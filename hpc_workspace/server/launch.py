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

from hpc_workspace.server.settings import Settings, SettingsError, load_settings

_KEEP_ALIVE_S = 60  # the door is in front, and its clients give up idle connections first
_BACKLOG = 512
_STOP_S = 0.3


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. Returns 2, with one line on stderr, when it can't start."""
    arguments = _parse(argv)
    os.umask(0o077)
    try:
        settings = load_settings(dict(os.environ))
        listener = _listen_unix(arguments.uds) if arguments.uds else _listen_tcp(arguments.port)
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


def _listen_unix(path: str) -> socket.socket:
    """The socket, made under umask 077: at no moment could a stranger connect (uvicorn's own would be 0666)."""
    with contextlib.suppress(FileNotFoundError):
        if Path(path).is_socket():
            Path(path).unlink()  # left by a server that was killed; a live one's directory is its own
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(_BACKLOG)
    return listener


def _listen_tcp(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(_BACKLOG)
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
    import uvicorn

    from hpc_workspace.server.app import build_app
    from hpc_workspace.server.table import CommandTable

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    class QuickServer(uvicorn.Server):
        """Without uvicorn's polling for its end, its waiting for connections, and its signal handlers."""

        async def main_loop(self) -> None:
            await self.on_tick(0)  # sets the default headers
            await stop.wait()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            await table.end_all(grace_s=_STOP_S)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    table = CommandTable(settings)
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


def _websocket_protocol(**options: Any) -> asyncio.Protocol:
    """uvicorn's WebSocket protocol, imported when the first one is opened."""
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    return WebSocketsSansIOProtocol(**options)
