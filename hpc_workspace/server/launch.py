"""Starting the server: arguments, settings, the socket, the stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from hpc_workspace.server.settings import Settings, SettingsError, load_settings

_STOP_GRACE_S = 0.3
# The door keeps connections open for its clients; uvicorn's own 5 s would cut them under it.
_KEEPALIVE_S = 60


def main(arguments: list[str]) -> int:
    """Serve until TERM or INT. Returns the exit code: 2 where it can't start."""
    parser = argparse.ArgumentParser(prog="python -m hpc_workspace.server")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uds", metavar="PATH", help="listen on a Unix socket, made 0600")
    where.add_argument("--port", type=int, help="listen on this port of 127.0.0.1")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = load_settings(dict(os.environ))
        listener = _listen(options.uds, options.port)
        Path(settings.working_dir).mkdir(parents=True, exist_ok=True)
    except (SettingsError, OSError) as error:
        sys.stderr.write(f"hpc_workspace.server: {error}\n")
        return 2
    asyncio.run(_serve(settings, listener))
    return 0


def _listen(path: str | None, port: int | None) -> socket.socket:
    """A listening socket. uvicorn would make a Unix one 0666; bound here under our umask, it is ours alone."""
    if path is None:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port or 0))
    else:
        Path(path).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
    listener.listen(256)
    return listener


async def _serve(settings: Settings, listener: socket.socket) -> None:
    import uvicorn

    from hpc_workspace.server.app import make_app
    from hpc_workspace.server.table import CommandTable

    table = CommandTable(settings)
    config = uvicorn.Config(
        make_app(settings, table),
        lifespan="off",
        access_log=False,
        log_config=None,
        timeout_keep_alive=_KEEPALIVE_S,
        timeout_graceful_shutdown=0,
        server_header=False,
    )
    server = uvicorn.Server(config)
    # uvicorn's own handlers would wait for open streams; ours end the commands first.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await table.end_all(grace_s=_STOP_GRACE_S)
    server.should_exit = server.force_exit = True
    await serving
