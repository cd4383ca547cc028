"""The application: all routes, behind the key check."""

import sys
import time

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hpc_workspace.server.auth import KeyCheck
from hpc_workspace.server.bash_routes import bash_routes
from hpc_workspace.server.files import file_routes
from hpc_workspace.server.git import git_routes
from hpc_workspace.server.requests import RequestError
from hpc_workspace.server.settings import Settings
from hpc_workspace.server.sockets import socket_routes
from hpc_workspace.server.table import CommandTable
from hpc_workspace.version import __version__

TITLE = "hpc-workspace agent server"
CAPABILITIES = ("float_timeout", "client_command_id", "stream", "raw_upload", "env", "byte_exact")


def build_app(settings: Settings, table: CommandTable) -> Starlette:
    """The ASGI application over one table of commands."""
    return Starlette(
        routes=[
            *_details_routes(table),
            *bash_routes(table),
            *file_routes(),
            *git_routes(lambda: table.environment, settings.toolbox),
            *socket_routes(table),
        ],
        middleware=[Middleware(KeyCheck, keys=settings.session_api_keys, on_request=table.count_request)],
        exception_handlers={RequestError: _on_request_error},
    )


def _details_routes(table: CommandTable) -> list[Route]:
    started_s = time.monotonic()

    async def is_up(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def is_ready(_: Request) -> Response:
        return JSONResponse({"status": "ready"})

    async def server_info(_: Request) -> Response:
        return JSONResponse(
            {
                "title": TITLE,
                "version": __version__,
                "python_version": sys.version,
                "uptime": time.monotonic() - started_s,
                "idle_time": table.idle_s(),
                "running_commands": len(table.running),
                "capabilities": list(CAPABILITIES),
            }
        )

    return [
        Route("/health", is_up),
        Route("/alive", is_up),
        Route("/ready", is_ready),
        Route("/server_info", server_info),
    ]


async def _on_request_error(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RequestError) else 500
    return JSONResponse({"detail": str(error)}, status_code=status)
