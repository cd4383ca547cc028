"""The door's exchange: only who knows the token gets through, whatever bytes the others send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_workspace import exchange
from hpc_workspace.exchange import ExchangeError, Verdict, Wish

NONCE = st.binary(min_size=32, max_size=32)
TOKEN = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=60)
WISHES = st.one_of(
    st.sampled_from([Wish(want="server"), Wish(want="lease"), Wish(want="end"), Wish(want="detach")]),
    st.builds(lambda port: Wish(want="port", port=port), st.integers(1, 65535)),
)


@given(TOKEN, NONCE, NONCE, WISHES)
def test_who_knows_the_token_gets_his_wish(token: str, client: bytes, door: bytes, wish: Wish) -> None:
    assert exchange.parse_hello(exchange.build_hello(client)) == client
    assert exchange.parse_answer(exchange.build_answer(token, "ws-1", client, door), token, "ws-1", client) == door
    request = exchange.build_request(token, "ws-1", client, door, wish)
    head, said = request[: exchange.REQUEST_HEAD_BYTES], request[exchange.REQUEST_HEAD_BYTES :]
    assert exchange.parse_request_head(head) == len(said)
    assert exchange.parse_request(head, said, token, "ws-1", client, door) == wish


@given(TOKEN, TOKEN, NONCE, NONCE, WISHES)
def test_another_token_gets_neither_side_past_the_other(
    mine: str, theirs: str, client: bytes, door: bytes, wish: Wish
) -> None:
    if mine == theirs:
        return
    with pytest.raises(ExchangeError):
        exchange.parse_answer(exchange.build_answer(theirs, "ws-1", client, door), mine, "ws-1", client)
    request = exchange.build_request(theirs, "ws-1", client, door, wish)
    head, said = request[: exchange.REQUEST_HEAD_BYTES], request[exchange.REQUEST_HEAD_BYTES :]
    with pytest.raises(ExchangeError):
        exchange.parse_request(head, said, mine, "ws-1", client, door)


@given(TOKEN, NONCE, NONCE, WISHES, st.integers(0, 10_000), st.integers(1, 255))
def test_a_request_with_one_byte_changed_is_refused(
    token: str, client: bytes, door: bytes, wish: Wish, place: int, change: int
) -> None:
    request = bytearray(exchange.build_request(token, "ws-1", client, door, wish))
    place %= len(request)
    if exchange.PROOF_BYTES <= place < exchange.REQUEST_HEAD_BYTES:
        return  # the length: another length is another read, not another request
    request[place] ^= change
    head, said = bytes(request[: exchange.REQUEST_HEAD_BYTES]), bytes(request[exchange.REQUEST_HEAD_BYTES :])
    with pytest.raises(ExchangeError):
        exchange.parse_request(head, said, token, "ws-1", client, door)


@given(st.binary(max_size=200), NONCE)
def test_noise_is_no_hello_and_no_answer(noise: bytes, client: bytes) -> None:
    with pytest.raises(ExchangeError):
        exchange.parse_answer(noise, "token", "ws-1", client)
    if not noise.startswith(exchange.MAGIC):
        with pytest.raises(ExchangeError):
            exchange.parse_hello(noise)


@given(TOKEN, NONCE, NONCE)
def test_the_token_itself_never_travels(token: str, client: bytes, door: bytes) -> None:
    sent = exchange.build_answer(token, "ws-1", client, door)
    sent += exchange.build_request(token, "ws-1", client, door, Wish(want="server"))
    assert token.encode() not in sent


def test_a_verdict_keeps_its_text() -> None:
    said = exchange.build_verdict(Verdict.NO_SERVER, "grüß")
    verdict, length = exchange.parse_verdict_head(said[: exchange.VERDICT_HEAD_BYTES])
    assert (verdict, said[exchange.VERDICT_HEAD_BYTES :].decode(), length) == (Verdict.NO_SERVER, "grüß", 6)
