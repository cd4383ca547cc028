"""A real server process on a Unix socket, and a client for it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

KEY = "k" * 43
HEADERS = {"X-Session-API-Key": KEY}


def eventually(is_so: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """The first truthy answer of `is_so`; fails after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (answer := is_so()):
        assert time.monotonic() < deadline, "it never became so"
        time.sleep(0.005)
    return answer


def write_config(folder: Path, **changes: Any) -> Path:
    """A configuration file as the node writes it."""
    values = {"session_api_keys": [KEY], "working_dir": str(folder / "ws"), "spool_dir": str(folder / "spool")}
    path = folder / "config.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(values | changes))
    return path


class RunningServer:
    """`python -m hpc_workspace.server --uds`, answering."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.socket = folder / "s"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hpc_workspace.server", "--uds", str(self.socket)],
            env={
                **os.environ,
                "HPC_WORKSPACE_SERVER_CONFIG": str(write_config(folder)),
                **(environment or {}),
            },
            stderr=subprocess.PIPE,
        )
        self.http = self.client()
        eventually(self._answers)

    def client(self, **options: Any) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(
            **{"transport": transport, "base_url": "http://server", "headers": HEADERS, "timeout": 30} | options
        )

    def run(self, command: str, **options: Any) -> dict[str, Any]:
        answer = self.http.post("/api/bash/execute_bash_command", json={"command": command, **options})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def start(self, command: str, **options: Any) -> dict[str, Any]:
        answer = self.http.post("/api/bash/start_bash_command", json={"command": command, **options})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, **query: Any) -> list[dict[str, Any]]:
        answer = self.http.get("/api/bash/bash_events/search", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()["items"]

    def stream(self, command: str, **options: Any) -> list[dict[str, Any]]:
        with self.http.stream("POST", "/api/bash/stream", json={"command": command, **options}) as answer:
            return [json.loads(line) for line in answer.iter_lines()]

    def info(self) -> dict[str, Any]:
        return self.http.get("/server_info").json()

    def memory_bytes(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def stop(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=10)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server died"
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False


def joined(lines: list[dict[str, Any]], stream: str) -> bytes:
    """The bytes of one stream among the lines of /api/bash/stream."""
    return b"".join(base64.b64decode(line["data_b64"]) for line in lines if line.get("stream") == stream)


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
