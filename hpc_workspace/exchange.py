"""The door's opening exchange, as functions over bytes: no socket, no clock.

Client and door prove to each other that they know the workspace's token, which itself never travels, and the client
says what it wants. One round trip, then bytes:

    client -> door   hello     MAGIC, 32 bytes of client nonce
    door -> client   answer    MAGIC, 32 bytes of door nonce, 32 bytes of door proof
    client -> door   request   32 bytes of client proof, two bytes of length, the wish as JSON
    door -> client   verdict   one status byte, two bytes of length, UTF-8 text; then, if it is OK, the bytes relayed

The client checks the door's proof before it sends anything but a nonce. It need not wait for the verdict before it
sends what is to be relayed. Both proofs cover the workspace's id, both nonces and, the client's, the wish, so that none
can be replayed, turned round, or moved to another wish or workspace.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from enum import IntEnum
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAGIC = b"HWDOOR1\n"
NONCE_BYTES = 32
PROOF_BYTES = 32
HELLO_BYTES = len(MAGIC) + NONCE_BYTES
ANSWER_BYTES = HELLO_BYTES + PROOF_BYTES
REQUEST_HEAD_BYTES = PROOF_BYTES + 2
VERDICT_HEAD_BYTES = 3
WISH_MAX_BYTES = 512


class ExchangeError(Exception):
    """The other side does not speak this exchange, or does not know the token. Says nothing secret."""


class Verdict(IntEnum):
    """The door's answer to a wish."""

    OK = 0
    REFUSED = 1
    NO_SERVER = 2
    NOT_OURS = 3


class Wish(BaseModel):
    """What a client wants from the door.

    `server`: be relayed to the agent server. `port`: to another TCP port inside the workspace. `lease`: nothing but
    to be there; the door says goodbye on it when all is gone. `end`: end the workspace, then as `lease`. `detach`: as
    `lease`, and from now on the workspace outlives its clients until it is idle for too long. `reverse`: be
    parked for the reverse forward `name`, on `port` inside if that is given; the verdict's text is the port, and one
    byte says that the connection is wanted, and carries on from there.
    A zero byte from the client says that it wants no more of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    want: Literal["server", "port", "lease", "end", "detach", "reverse"]
    port: int | None = Field(default=None, gt=0, lt=65536)
    name: str | None = Field(default=None, pattern=r"^[0-9a-f]{16}$")


def make_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def make_token() -> str:
    """A new session key: 32 random bytes, URL-safe."""
    return secrets.token_urlsafe(32)


class Source(Protocol):
    """Anything that bytes come from; none means the end."""

    def recv(self, size: int, /) -> bytes: ...


def receive_exactly(source: Source, count: int) -> bytes:
    """`count` bytes from `source`.

    Raises:
        OSError: it broke, or ended before.
    """
    data = b""
    while len(data) < count:
        piece = source.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("the connection ended in the middle of the exchange")
        data += piece
    return data


def build_hello(nonce: bytes) -> bytes:
    return MAGIC + nonce


def parse_hello(data: bytes) -> bytes:
    """The client's nonce.

    Raises:
        ExchangeError: this is no hello.
    """
    if len(data) != HELLO_BYTES or not data.startswith(MAGIC):
        raise ExchangeError("the client does not speak this exchange")
    return data[len(MAGIC) :]


def _proof(token: str, side: bytes, workspace_id: str, client_nonce: bytes, door_nonce: bytes, said: bytes) -> bytes:
    # The nonces have a fixed length and the id has none of the separators, so no two transcripts read alike.
    transcript = b"\0".join((MAGIC, side, workspace_id.encode(), client_nonce + door_nonce + said))
    return hmac.digest(token.encode(), transcript, hashlib.sha256)


def build_answer(token: str, workspace_id: str, client_nonce: bytes, door_nonce: bytes) -> bytes:
    return MAGIC + door_nonce + _proof(token, b"door", workspace_id, client_nonce, door_nonce, b"")


def parse_answer(data: bytes, token: str, workspace_id: str, client_nonce: bytes) -> bytes:
    """The door's nonce, after its proof was checked.

    Raises:
        ExchangeError: whoever answered does not know the token; nothing more may be sent to it.
    """
    if len(data) != ANSWER_BYTES or not data.startswith(MAGIC):
        raise ExchangeError("whoever listens there does not speak this exchange")
    door_nonce, proof = data[len(MAGIC) : HELLO_BYTES], data[HELLO_BYTES:]
    if not hmac.compare_digest(proof, _proof(token, b"door", workspace_id, client_nonce, door_nonce, b"")):
        raise ExchangeError("whoever listens there does not know this workspace's token")
    return door_nonce


def build_request(token: str, workspace_id: str, client_nonce: bytes, door_nonce: bytes, wish: Wish) -> bytes:
    said = wish.model_dump_json(exclude_none=True).encode()
    return _proof(token, b"client", workspace_id, client_nonce, door_nonce, said) + struct.pack(">H", len(said)) + said


def parse_request_head(head: bytes) -> int:
    """How many bytes of wish follow.

    Raises:
        ExchangeError: more than a wish can have.
    """
    (length,) = struct.unpack(">H", head[PROOF_BYTES:])
    if length > WISH_MAX_BYTES:
        raise ExchangeError("the wish is too long")
    return int(length)


def parse_request(
    head: bytes, said: bytes, token: str, workspace_id: str, client_nonce: bytes, door_nonce: bytes
) -> Wish:
    """The wish, after the client's proof was checked.

    Raises:
        ExchangeError: the client does not know the token, or its wish is none.
    """
    expected = _proof(token, b"client", workspace_id, client_nonce, door_nonce, said)
    if not hmac.compare_digest(head[:PROOF_BYTES], expected):
        raise ExchangeError("the client does not know this workspace's token")
    try:
        return Wish.model_validate(_json(said))
    except ValidationError as error:
        raise ExchangeError("the client wants something unknown") from error


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ExchangeError("the wish is not JSON") from error


def build_verdict(verdict: Verdict, text: str = "") -> bytes:
    said = text.encode()[:1000]
    return struct.pack(">BH", verdict, len(said)) + said


def parse_verdict_head(head: bytes) -> tuple[Verdict, int]:
    """The verdict, and how many bytes of text follow.

    Raises:
        ExchangeError: an unknown verdict.
    """
    code, length = struct.unpack(">BH", head)
    try:
        return Verdict(code), int(length)
    except ValueError as error:
        raise ExchangeError(f"the door gave an unknown verdict ({code})") from error
