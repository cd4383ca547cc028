"""The agent server's REST API, spoken through the door. The only package that uses httpx and httpcore.

Both servers speak the paths of OpenHands' agent server (1.58). What only the bundled server has (a command's own id,
streaming, raw transfers) is used where `server` says that it is the bundled one; on the other, shell text of ours makes
up for what it lacks (`supervising`, `plain_files`, `listing`).
"""

from __future__ import annotations

from typing import Any, Literal

import httpx

from hpc_workspace.client.calls import AtOnce, Caller, Way
from hpc_workspace.client.commands import Commands
from hpc_workspace.client.files import Files
from hpc_workspace.client.git import Git
from hpc_workspace.client.shared import SharedMount


class AgentServerClient:
    """Commands, files, git and health of one agent server. Arguments: as `Caller`, and `Files`.

    Attributes:
        commands, files, git: what can be done.
    """

    def __init__(
        self,
        way: Way,
        *,
        api_key: str,
        server: Literal["bundled", "image"],
        working_dir: str,
        mount: SharedMount | None = None,
    ) -> None:
        self._caller = Caller(way, api_key=api_key, server=server, working_dir=working_dir)
        self.commands = Commands(self._caller)
        self.files = Files(self._caller, self.commands, mount)
        self.git = Git(self._caller, self.commands, self.files)

    @property
    def http(self) -> httpx.Client:
        """An HTTP client with the key and the way built in."""
        return self._caller.http

    def close(self) -> None:
        """Close its connections."""
        self._caller.close()

    def health(self) -> dict[str, Any]:
        """What the server says of itself: title, version, uptime, idle_time (seconds) and more.

        Raises:
            ServerError, TunnelError: it does not answer, or not sensibly.
        """
        return self._caller.json("GET", "/server_info")


__all__ = ["AgentServerClient", "AtOnce", "Way"]
