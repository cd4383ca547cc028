"""The agent server on its node, as the node program sees it: how it is started, reached and asked."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass

from hpc_workspace.node.identity import Family

_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Address:
    """Where the agent server listens on this node: a Unix socket, or a port of 127.0.0.1."""

    socket_path: str | None = None
    port: int | None = None

    def connect(self, family: Family) -> socket.socket:
        """A connection to the server, after the check that the listener is the container's own.

        Raises:
            OSError: nobody listens.
            NotOursError: somebody else does.
        """
        if self.socket_path is not None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(_CONNECT_TIMEOUT_S)
            try:
                connection.connect(self.socket_path)
                family.require_unix_peer(connection)
            except BaseException:
                connection.close()
                raise
        else:
            assert self.port is not None
            connection = connect_port(self.port, family)
        connection.settimeout(None)
        return connection


def connect_port(port: int, family: Family) -> socket.socket:
    """A connection to 127.0.0.1:port, after the check that the listener is the container's own.

    Raises:
        OSError: nobody listens.
        NotOursError: somebody else does.
    """
    connection = socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_TIMEOUT_S)
    try:
        family.require_tcp_listener(port)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def ask(address: Address, family: Family, path: str, timeout_s: float = 5.0) -> dict[str, object]:
    """The server's answer to a GET that needs no key.

    Raises:
        OSError: nobody answers.
        NotOursError: somebody else listens.
        ValueError: the answer is not JSON with status 200.
    """
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", timeout=timeout_s)
    connection.sock = address.connect(family)
    connection.sock.settimeout(timeout_s)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read(65536)
    except http.client.HTTPException as error:
        raise OSError(f"not an HTTP answer: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"status {response.status}")
    answer = json.loads(body)
    return answer if isinstance(answer, dict) else {}
