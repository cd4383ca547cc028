"""Output put together again from pieces cut anywhere is what was written; texts and bytes stand for each other."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_workspace.client.supervised_commands import _decoded
from hpc_workspace.results import CommandOutput, CommandResult
from hpc_workspace.server.output import OutputLog, as_fields, whole_characters

DATA = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(["ü".encode(), "€".encode(), "\U0001f600".encode(), b"\xff", b"\0", b"a"])).map(b"".join),
)


def bytes_of(name: str, fields: dict[str, str | None]) -> bytes:
    encoded = fields[f"{name}_b64"]
    return base64.b64decode(encoded) if encoded else (fields[name] or "").encode()


@given(DATA)
def test_fields_carry_every_byte(data: bytes) -> None:
    assert bytes_of("stdout", as_fields("stdout", data)) == data


@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_whole_characters_never_cut_one(text: str, drawn: st.DataObject) -> None:
    data = text.encode()
    cut = data[: drawn.draw(st.integers(0, len(data)))]
    whole = cut[: whole_characters(cut)]
    assert text.startswith(whole.decode())
    assert len(cut) - len(whole) < 4


@given(DATA)
def test_at_most_three_bytes_wait_for_the_rest_of_their_character(data: bytes) -> None:
    assert len(data) - whole_characters(data) < 4


@settings(deadline=None)
@given(st.lists(DATA, max_size=8), st.integers(0, 64), st.integers(0, 400), st.integers(4, 50))
def test_a_log_read_on_from_any_place_gives_all_that_was_written(
    pieces: list[bytes], memory_bytes: int, start: int, limit: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = OutputLog(Path(folder, "log"), memory_bytes=memory_bytes)
        for piece in pieces:
            log.append(piece)
        written = b"".join(pieces)
        found, place = b"", min(start, len(written))
        while place < len(written):
            began, data = log.read_many(place, limit)
            assert began == place
            assert 0 < len(data) <= limit
            found, place = found + data, place + len(data)
        assert found == written[min(start, len(written)) :]
        assert (log.total, log.is_truncated) == (len(written), len(written) > memory_bytes)
        if log.file is not None:
            assert Path(log.file).read_bytes() == written
        log.discard()


@given(DATA, st.lists(st.integers(0, 250), max_size=6))
def test_a_client_that_reads_on_gets_every_byte_and_no_half_character(data: bytes, moments: list[int]) -> None:
    """`moments`: how much had been written each time that the client asked."""
    told = b""
    for written in [*sorted(min(moment, len(data)) for moment in moments), None]:
        text = _decoded(data[len(told) : written], is_last=written is None)
        answer = CommandOutput(command_id="x", stdout=text, stdout_from=len(told))
        told += answer.stdout_bytes
        assert answer.stdout_end == len(told)
        assert data.startswith(told)
    assert told == data


@given(DATA)
def test_the_bytes_of_a_result_are_those_that_were_printed(data: bytes) -> None:
    result = CommandResult(command="x", exit_code=0, stdout=data.decode("utf-8", "surrogateescape"))
    assert result.stdout_bytes == data
    assert CommandResult.model_validate(result.model_dump()) == result
