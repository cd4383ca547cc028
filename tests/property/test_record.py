"""The record under many lives of a job and one reader: always whole, never an earlier life's again; not believed if not."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_workspace.errors import RendezvousCorruptError, RendezvousStaleError
from hpc_workspace.record import Record, Spec
from hpc_workspace.rendezvous import WorkspaceDirectory

SPEC = Spec(
    workspace_id="ws-0123456789", launch_id="l", runtime="process", server="bundled", image=None, toolbox=None,
    working_dir="/workspace", mount_dir=None, binds=[], use_fakeroot=True, enable_gpu=False, enable_docker_compat=True,
    disable_mount_locations=[], writable="overlay", health_check_timeout_s=1, ends_with_lease=True, idle_timeout_s=None,
)  # fmt: skip


def _record(writer: int, number: int) -> Record:
    return Record(
        workspace_id=SPEC.workspace_id, launch_id="l", job_id="7", restart_count=number, state="ready",
        node=f"n{writer}", port=1, socket="/s", owner="o", runtime="process", server="bundled", working_dir="/w",
        node_scratch="/t", started_at=0.0, notices=[f"{writer}/{number}"] * (number % 7 * 40),
    )  # fmt: skip


def _write(path: str, writer: int) -> None:
    for number in range(150):
        with contextlib.suppress(RendezvousStaleError):
            WorkspaceDirectory(Path(path)).publish(_record(writer, number))


def test_a_reader_never_sees_half_a_record_nor_an_earlier_life_again(tmp_path: Path) -> None:
    directory = WorkspaceDirectory.create(SPEC, "t", {})
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(str(directory.path), n)) for n in range(3)]
    for writer in writers:
        writer.start()
    seen = 0
    last = (0, 0)
    while any(writer.is_alive() for writer in writers):
        if (record := directory.read_record()) is not None:
            seen += 1
            assert record == _record(int(record.node.removeprefix("n")), record.restart_count)
            assert record.fence >= last
            last = record.fence
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert seen > 10
    left = {name for name in os.listdir(directory.path) if name.startswith(".")}
    assert left == set()


_WHOLE = _record(1, 1).model_dump_json().encode()


def _damage(choice: tuple[str, int, bytes]) -> bytes:
    how, place, more = choice
    place %= len(_WHOLE)
    if how == "cut":
        return _WHOLE[:place]
    if how == "other":
        return more
    return _WHOLE[:place] + more + _WHOLE[place + len(more) :]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(st.sampled_from(["cut", "other", "overwrite"]), st.integers(0, 10_000), st.binary(max_size=40)))
def test_a_damaged_record_is_an_error_that_names_it_or_one_that_could_have_been_written(
    tmp_path: Path, choice: tuple[str, int, bytes]
) -> None:
    path = tmp_path / SPEC.workspace_id
    path.mkdir(mode=0o700, exist_ok=True)
    (path / "record.json").write_bytes(_damage(choice))
    (path / "record.json").chmod(0o600)
    try:
        found: Any = WorkspaceDirectory(path).read_record()
    except RendezvousCorruptError as error:
        assert "record.json" in str(error) or "another workspace" in str(error)
        assert len(str(error).splitlines()) < 6
    else:
        assert isinstance(found, Record)
        assert found.workspace_id == SPEC.workspace_id
