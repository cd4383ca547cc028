"""The body of a command request, checked by hand: pydantic is not in the toolbox."""

import math
import os
import uuid
from dataclasses import dataclass, field
from typing import Any

DEFAULT_TIMEOUT_S = 300.0
# Linux: MAX_ARG_STRLEN, 32 pages, with the closing NUL; a longer `bash -c` argument is E2BIG.
_MAX_COMMAND_BYTES = 128 * 1024 - 1


class RequestError(Exception):
    """The request can't be served as it is.

    Attributes:
        status: the HTTP status that says so.
    """

    def __init__(self, detail: str, status: int = 422) -> None:
        self.status = status
        super().__init__(detail)


@dataclass(frozen=True)
class CommandRequest:
    """What to run. `env` may hold secrets, so it is never echoed and not in the repr.

    Attributes:
        linger_s: of a stream: how long the command goes on when its reader is gone; None: to its end.
        stdout_from, stderr_from: of a stream: how many bytes its reader has already.
    """

    command: str
    cwd: str | None = None
    timeout_s: float | None = DEFAULT_TIMEOUT_S
    env: dict[str, str] = field(default_factory=dict, repr=False)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    linger_s: float | None = None
    stdout_from: int = 0
    stderr_from: int = 0


def parse_command_request(body: object) -> CommandRequest:
    """Check the JSON body of execute, start or stream.

    Raises:
        RequestError: 422, naming the field.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object with a command")
    return CommandRequest(
        command=_command(body.get("command")),
        cwd=_cwd(body.get("cwd")),
        timeout_s=_seconds(body.get("timeout", DEFAULT_TIMEOUT_S), "timeout"),
        env=_env(body.get("env")),
        id=parse_id(body["id"]) if body.get("id") is not None else uuid.uuid4().hex,
        linger_s=_seconds(body.get("linger_s"), "linger_s"),
        stdout_from=_offset(body.get("stdout_from", 0), "stdout_from"),
        stderr_from=_offset(body.get("stderr_from", 0), "stderr_from"),
    )


def parse_id(value: object) -> str:
    """A UUID in any of its spellings, as 32 hex digits (upstream's spelling)."""
    try:
        return uuid.UUID(str(value)).hex
    except ValueError:
        raise RequestError(f"{value!r} is not a UUID") from None


def _command(value: object) -> str:
    if not isinstance(value, str):
        raise RequestError("command must be a string")
    if len(_encoded(value, "command")) > _MAX_COMMAND_BYTES:
        raise RequestError("command is longer than 128 KiB, the kernel's limit: upload it as a file and run that")
    return value


def _cwd(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise RequestError("cwd must be a path or null")
    _encoded(value, "cwd")
    return value


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RequestError(f"{name} must be a number of seconds, not negative, or null for none")
    return float(value)


def _offset(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"{name} must be a number of bytes, not negative")
    return value


def _env(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise RequestError("env must be an object of strings")
    for name, item in value.items():
        if not name or "=" in name:
            raise RequestError(f"env: {name!r} is not a variable name")
        _encoded(name, "env")
        _encoded(item, f"env[{name!r}]")
    return dict(value)


def _encoded(text: str, what: str) -> bytes:
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        raise RequestError(f"{what} holds a character that can't be encoded") from None
    if b"\0" in data:
        raise RequestError(f"{what} holds a NUL character")
    return data
