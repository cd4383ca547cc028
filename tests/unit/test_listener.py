"""The ports on this side serve this user, by whatever address he comes, and nobody else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from hpc_workspace.connect.listener import Listener
from hpc_workspace.connect.streams import SocketStream
from tests.conftest import skip_or_fail

NOBODY = 65534
ASK = """
import os, socket, sys
uid, way, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if uid != os.getuid():
    os.setuid(uid)
if way == "mapped":
    s = socket.socket(socket.AF_INET6)
    s.connect(("::ffff:127.0.0.1", port))
else:
    s = socket.socket()
    s.bind((way, 0))
    s.connect(("127.0.0.1", port))
try:
    s.sendall(b"hello")
    print(s.recv(5).decode())
except ConnectionError:
    print()
"""


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Each connection reaches something that echoes."""

    def dial() -> SocketStream:
        near, far = socket.socketpair()

        def echo() -> None:
            while data := far.recv(100):
                far.sendall(data)

        threading.Thread(target=echo, daemon=True).start()
        return SocketStream(near)

    made = Listener(dial)
    yield made
    made.close()


def ask(listener: Listener, uid: int, way: str) -> str:
    argv = [sys.executable, "-c", ASK, str(uid), way, str(listener.port)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


WAYS = ("127.0.0.1", "127.0.0.2", "mapped")


@pytest.mark.parametrize("way", WAYS)
def test_its_own_user_is_served(listener: Listener, way: str) -> None:
    assert ask(listener, os.getuid(), way) == "hello"


@pytest.mark.parametrize("way", WAYS)
def test_another_user_is_turned_away_by_whatever_address_he_comes(listener: Listener, way: str) -> None:
    if os.getuid() != 0:
        skip_or_fail("it takes root to become another user")
    assert ask(listener, NOBODY, way) == ""
    assert ask(listener, 0, way) == "hello"
