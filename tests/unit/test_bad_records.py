"""Every kind of file that should not be in a workspace directory: refused with a typed error that fits on a screen.

Beside test_rendezvous.py (that a spoiled record is refused at all) and tests/property/test_record.py (random damage):
who owns the file, what kind it is, each way in which its content can be wrong, and what is told to a person.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from hpc_workspace import Workspace
from hpc_workspace.errors import (
    RendezvousCorruptError,
    RendezvousError,
    RendezvousStaleError,
    RendezvousTimeoutError,
    WorkspaceError,
)
from hpc_workspace.owner import Owner
from hpc_workspace.record import Record, Spec
from hpc_workspace.rendezvous import MAX_BYTES, WorkspaceDirectory, paths_in_use
from tests.conftest import skip_or_fail
from tests.unit.test_rendezvous import make_record, make_spec

ID = "ws-0123456789"
NOBODY = 65534

Read = Callable[[WorkspaceDirectory], object]
READERS: dict[str, Read] = {
    "record.json": WorkspaceDirectory.read_record,
    "spec.json": WorkspaceDirectory.read_spec,
    "token": WorkspaceDirectory.read_token,
    "environment": WorkspaceDirectory.read_environment,
    "runtime_environment": WorkspaceDirectory.read_runtime_environment,
}


def _record(**changes: object) -> Record:
    """A record of a node that nobody can reach, whatever this machine knows of the names in other tests."""
    return make_record(**({"node": "n01.invalid", "working_dir": "/w"} | changes))


@pytest.fixture
def directory() -> WorkspaceDirectory:
    """A workspace that is ready, and whose node program is alive, as far as its files go."""
    spec = make_spec().model_copy(update={"image": "/images/x.sif", "working_dir": "/w", "max_processes": 4000})
    made = WorkspaceDirectory.create(spec, "t0ken", {"A": "1"}, {"B": "2"})
    made.publish(_record())
    made.touch_heartbeat()
    return made


def _promptly(call: Callable[[], object]) -> object:
    """What `call` returns or raises; a failure if it does neither in 10 s."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert found, "it hangs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _require_for_people(error: WorkspaceError) -> None:
    """It fits on a screen, and holds nothing that a terminal would obey."""
    text = str(error)
    assert len(text) < 1500
    assert len(text.splitlines()) < 10
    assert text.replace("\n", "").isprintable()


def _refused(read: Callable[[], object]) -> RendezvousCorruptError:
    with pytest.raises(RendezvousCorruptError) as caught:
        _promptly(read)
    _require_for_people(caught.value)
    return caught.value


# What kind of file it is


def _group_reads(path: Path) -> None:
    path.chmod(0o640)


def _others_read(path: Path) -> None:
    path.chmod(0o604)


def _others_write(path: Path) -> None:
    path.chmod(0o602)


def _somebody_elses(path: Path) -> None:
    if os.getuid() != 0:
        skip_or_fail("chown needs root")
    os.chown(path, NOBODY, NOBODY)


def _link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def _link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nosuch")


def _link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)


def _socket(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has a limit of 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)
    path.chmod(0o600)


def _terminal(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/tty")


def _one_byte_too_large(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data + b" " * (MAX_BYTES + 1 - len(data)))


def _of_a_terabyte(path: Path) -> None:
    os.truncate(path, 10**12)


KINDS: dict[Callable[[Path], None], str] = {
    _group_reads: r"is open to others \(mode 0640\)",
    _others_read: r"is open to others \(mode 0604\)",
    _others_write: r"is open to others \(mode 0602\)",
    _somebody_elses: f"belongs to user {NOBODY}",
    _link: "can't be opened",
    _link_to_nothing: "can't be opened",
    _link_to_itself: "can't be opened",
    _fifo: "is not a regular file",
    _folder: "is not a regular file",
    _socket: "can't be opened",
    _terminal: "can't be opened",
    _one_byte_too_large: rf"is too large \({MAX_BYTES + 1} bytes\)",
    _of_a_terabyte: r"is too large \(1000000000000 bytes\)",
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("spoil", KINDS)
def test_a_file_of_the_wrong_kind_is_named_with_what_is_wrong(
    spoil: Callable[[Path], None], name: str, directory: WorkspaceDirectory
) -> None:
    spoil(directory.path / name)
    error = _refused(lambda: READERS[name](directory))
    assert str(directory.path / name) in error.what
    assert re.search(KINDS[spoil], error.what)


@pytest.mark.parametrize("spoil", KINDS)
def test_no_client_attaches_by_a_record_of_the_wrong_kind_and_the_others_are_listed_all_the_same(
    spoil: Callable[[Path], None], directory: WorkspaceDirectory
) -> None:
    other = _record(workspace_id="ws-1111111111")
    WorkspaceDirectory.create(make_spec(other.workspace_id), "t", {}).publish(other)
    spoil(directory.path / "record.json")
    _refused(lambda: Workspace.attach(ID))
    assert Workspace.list() == [other]
    assert paths_in_use() == [Path("/images/x.sif")]  # it may live


@pytest.mark.parametrize("spoil", [spoil for spoil in KINDS if spoil is not _folder])
def test_a_record_of_the_wrong_kind_is_replaced_by_the_next_one(
    spoil: Callable[[Path], None], directory: WorkspaceDirectory
) -> None:
    spoil(directory.path / "record.json")
    _promptly(lambda: directory.publish(_record(notices=["again"])))
    assert directory.read_record() == _record(notices=["again"])


def test_a_directory_in_the_records_place_can_not_be_replaced(directory: WorkspaceDirectory) -> None:
    _folder(directory.path / "record.json")
    with pytest.raises(RendezvousError, match="can't be written") as caught:
        directory.publish(_record())
    _require_for_people(caught.value)
    assert not [path for path in directory.path.iterdir() if path.name.startswith(".")]


def test_a_record_of_the_greatest_size_is_read(directory: WorkspaceDirectory) -> None:
    path = directory.path / "record.json"
    data = path.read_bytes()
    path.write_bytes(data + b" " * (MAX_BYTES - len(data)))
    assert directory.read_record() == _record()


def test_a_fifo_in_the_place_of_heartbeat_or_log_holds_nobody_up(directory: WorkspaceDirectory) -> None:
    for path in (directory.heartbeat, directory.node_log):
        _fifo(path)
    assert _promptly(lambda: directory.log_tail(directory.node_log)) == ""
    try:
        _promptly(directory.touch_heartbeat)
    except (OSError, RendezvousError) as error:
        assert "heartbeat" in str(error)


# What is in it


def _contents(record: bytes) -> dict[str, bytes]:
    """Contents that are no record, each by what is wrong with it."""
    return {
        "nothing": b"",
        "a space": b" ",
        "zeros, as after a crash of the server": b"\0" * len(record),
        "zeros at the end": record[:100] + b"\0" * (len(record) - 100),
        "a byte order mark": b"\xef\xbb\xbf" + record,
        "UTF-16": record.decode().encode("utf-16"),
        "a value that is not UTF-8": record.replace(b'"/w"', b'"/\xff"'),
        "a name that is not UTF-8": record.replace(b'"working_dir"', b'"working_dir\xff"'),
        "half of a surrogate pair": record.replace(b'"/w"', rb'"/\ud800"'),
        "a control character": record.replace(b'"/w"', b'"/\x1b[2J"'),
        "an escaped control character": record.replace(b'"/w"', rb'"/\u001b[2J"'),
        "more after it": record + b"x",
        "twice": record + record,
        "a list": b"[" + record + b"]",
        "a string": json.dumps(record.decode()).encode(),
        "a number": b"7",
        "not a number": b"NaN",
        "null": b"null",
        "an object without names": b"{}",
        "deep lists": b"[" * (MAX_BYTES // 2) + b"]" * (MAX_BYTES // 2),
        "deep lists without an end": b"[" * MAX_BYTES,
        "deep objects": b'{"a":' * (MAX_BYTES // 5),
        "a deep value": record.replace(b'"/w"', b"[" * 50_000 + b"]" * 50_000),
        "a number with very many digits": record.replace(b": 4000", b": " + b"9" * 200_000),
        "a schema of very many digits": record.replace(b'"schema_version": 1', b'"schema_version": ' + b"9" * 4000),
        "a name with very many letters": record.replace(b'"working_dir"', b'"' + b"w" * 200_000 + b'"'),
        "very many names": b"{" + b",".join(b'"a%d":1' % n for n in range(20_000)) + b"}",
        "another workspace's id": record.replace(ID.encode(), b"ws-9999999999"),
    }


CONTENTS = list(_contents(b""))


@pytest.mark.parametrize("file", ["record.json", "spec.json"])
@pytest.mark.parametrize("what", CONTENTS)
def test_a_content_that_is_none_is_named_with_its_file(what: str, file: str, directory: WorkspaceDirectory) -> None:
    path = directory.path / file
    before = path.read_bytes()
    path.write_bytes(_contents(before)[what])
    assert path.read_bytes() != before
    error = _refused(lambda: READERS[file](directory))
    assert str(path) in error.what


@pytest.mark.parametrize("what", CONTENTS)
def test_a_broken_record_disturbs_neither_the_list_nor_the_next_one(what: str, directory: WorkspaceDirectory) -> None:
    path = directory.path / "record.json"
    path.write_bytes(_contents(path.read_bytes())[what])
    assert _promptly(Workspace.list) == []
    assert _promptly(paths_in_use) == [Path("/images/x.sif")]
    _refused(lambda: Workspace.attach(ID))
    _promptly(lambda: directory.publish(_record()))
    assert directory.read_record() == _record()


@pytest.mark.parametrize("name", ["record.json", "spec.json"])
def test_every_beginning_of_a_file_but_the_whole_is_refused(name: str, directory: WorkspaceDirectory) -> None:
    path = directory.path / name
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RendezvousCorruptError, match=re.escape(name)) as caught:
            READERS[name](directory)
        _require_for_people(caught.value)
    path.write_bytes(whole)
    READERS[name](directory)


MODELS: dict[str, type[BaseModel]] = {"record.json": Record, "spec.json": Spec}
FIELDS = [(name, field) for name, model in MODELS.items() for field in model.model_fields]
NO_TYPE_OF_OURS: tuple[object, ...] = ([{}], {"": [1]})


def _with(directory: WorkspaceDirectory, name: str, field: str, value: object) -> None:
    path = directory.path / name
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {field: value}))


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_value_of_a_type_that_it_can_not_have_is_refused_and_named(
    name: str, field: str, directory: WorkspaceDirectory
) -> None:
    for value in NO_TYPE_OF_OURS:
        _with(directory, name, field, value)
        error = _refused(lambda: READERS[name](directory))
        assert str(directory.path / name) in error.what
        assert re.search(rf"\b{field}\b", str(error)), f"{field} is not named: {error}"


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, field in FIELDS if MODELS[name].model_fields[field].is_required()]
)
def test_a_file_without_a_field_that_it_must_have_is_refused_and_the_field_named(
    name: str, field: str, directory: WorkspaceDirectory
) -> None:
    path = directory.path / name
    values = json.loads(path.read_bytes())
    del values[field]
    path.write_text(json.dumps(values))
    error = _refused(lambda: READERS[name](directory))
    assert re.search(rf"\b{field}\b", str(error)), f"{field} is not named: {error}"


# Values of the right type that cannot be.
IMPOSSIBLE: list[tuple[str, list[Any]]] = [
    ("schema_version", [0, -1, 1.5, math.inf]),
    ("workspace_id", ["", "..", "../ws-0123456789", "WS-0123456789", "ws-0123456789\n", "w" * 300]),
    ("launch_id", ["a\nb", "\x1b[2J"]),
    ("job_id", ["", "--me", "-1", "7_1", "7;x", "7 8", "7\n", "٣", "9" * 5000, 7]),
    ("restart_count", [-1, 1.5, math.nan]),
    ("state", ["", "READY", "running"]),
    ("node", ["a\nb", "\0"]),
    ("port", [-1, 65536, 10**30, 1.5, math.nan, math.inf]),
    ("socket", ["/tmp/a\nb"]),
    ("server", ["", "other"]),
    ("started_at", [math.nan, math.inf, -math.inf, 10**400]),
    ("time_left_s", [math.nan, math.inf, 10**400]),
    ("phases_s", [{"image": math.nan}, {"image": "soon"}]),
    ("extra_ports", [{"vnc": -1}, {"vnc": 65536}, {"vnc": "x"}]),
    ("notices", [[7], "a line"]),
    ("failure", [{}, {"kind": "ContainerError"}, {"kind": "a\nb", "what": "x"}, "ContainerError"]),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in IMPOSSIBLE for value in values],
    ids=lambda value: ascii(value)[:24],
)
def test_a_value_that_can_not_be_is_refused(field: str, value: object, directory: WorkspaceDirectory) -> None:
    _with(directory, "record.json", field, value)
    assert "record.json" in _refused(directory.read_record).what


@pytest.mark.parametrize("field", ["workspace_id", "launch_id"])
def test_a_spec_of_another_workspace_or_with_a_control_character_is_refused(
    field: str, directory: WorkspaceDirectory
) -> None:
    for value in ("ws-9999999999\n", "a\x1bb"):
        _with(directory, "spec.json", field, value)
        _refused(directory.read_spec)


# Versions


@pytest.mark.parametrize("more", ["working_dir", "a_later_field"])
@pytest.mark.parametrize("name", MODELS)
def test_a_newer_schema_is_refused_whether_or_not_it_looks_like_ours(
    name: str, more: str, directory: WorkspaceDirectory
) -> None:
    _with(directory, name, more, "/w")
    for schema in (2, 99):
        _with(directory, name, "schema_version", schema)
        error = _refused(lambda: READERS[name](directory))
        assert f"schema {schema}, newer than 1" in error.what
        assert "version of hpc-workspace" in error.remedy


def test_fields_that_a_later_version_added_to_a_record_are_passed_over(directory: WorkspaceDirectory) -> None:
    _with(directory, "record.json", "a_later_field", {"a": [1]})
    assert directory.read_record() == _record()
    failure = {"kind": "ContainerError", "what": "it broke", "a_later_field": 1}
    _with(directory, "record.json", "failure", failure)
    record = directory.read_record()
    assert record is not None
    assert record.failure is not None
    assert record.failure.what == "it broke"


def test_a_record_of_an_earlier_version_has_what_was_added_since_as_if_it_was_not_used(
    directory: WorkspaceDirectory,
) -> None:
    path = directory.path / "record.json"
    values = json.loads(path.read_bytes())
    required = {name: values[name] for name, field in Record.model_fields.items() if field.is_required()}
    path.write_text(json.dumps(required))
    assert directory.read_record() == _record()


# What is not there


def _remove(directory: WorkspaceDirectory) -> None:
    directory.remove()


def _file_instead(directory: WorkspaceDirectory) -> None:
    directory.remove()
    directory.path.write_text("x")


def _link_instead(directory: WorkspaceDirectory) -> None:
    directory.remove()
    directory.path.symlink_to("nosuch")


GONE = [_remove, _file_instead, _link_instead]


@pytest.mark.parametrize("name", ["record.json", "spec.json", "token"])
@pytest.mark.parametrize("go", GONE)
def test_a_directory_that_is_gone_is_a_rendezvous_error(
    go: Callable[[WorkspaceDirectory], None], name: str, directory: WorkspaceDirectory
) -> None:
    go(directory)
    with pytest.raises(RendezvousError, match=ID) as caught:
        READERS[name](directory)
    _require_for_people(caught.value)


@pytest.mark.parametrize("go", GONE)
def test_nobody_attaches_to_a_directory_that_is_gone(
    go: Callable[[WorkspaceDirectory], None], directory: WorkspaceDirectory
) -> None:
    go(directory)
    with pytest.raises(RendezvousError, match=ID) as caught:
        Workspace.attach(ID)
    _require_for_people(caught.value)
    assert Workspace.list() == []


@pytest.mark.parametrize("go", GONE)
def test_nothing_is_written_to_a_directory_that_is_gone(
    go: Callable[[WorkspaceDirectory], None], directory: WorkspaceDirectory
) -> None:
    go(directory)
    writes: list[Callable[[], object]] = [
        lambda: directory.write_batch_script("x"),
        lambda: directory.publish(_record()),
    ]
    for write in writes:
        with pytest.raises(RendezvousError, match=ID) as caught:
            write()
        _require_for_people(caught.value)
        assert not directory.path.is_dir()


@pytest.mark.parametrize("go", GONE)
def test_a_directory_that_is_gone_has_no_heartbeat(
    go: Callable[[WorkspaceDirectory], None], directory: WorkspaceDirectory
) -> None:
    go(directory)
    assert directory.heartbeat_age_s() is None


@pytest.mark.parametrize("workspace_id", ["", ".", "..", "../workspaces/ws-0123456789", "/etc", "ws-0123456789\n", "*"])
def test_an_id_that_is_none_is_an_error_that_quotes_it(workspace_id: str, directory: WorkspaceDirectory) -> None:
    with pytest.raises(RendezvousError, match=re.escape(repr(workspace_id))) as caught:
        Workspace.attach(workspace_id)
    _require_for_people(caught.value)


def test_a_state_directory_that_is_none_is_a_rendezvous_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HPC_WORKSPACE_HOME", str(tmp_path / "file"))
    for look in (Workspace.list, lambda: Workspace.attach(ID), lambda: WorkspaceDirectory.create(make_spec(), "t", {})):
        with pytest.raises(RendezvousError, match=re.escape(str(tmp_path / "file"))) as caught:
            look()
        _require_for_people(caught.value)


def test_a_workspace_without_a_record_is_not_there_yet(directory: WorkspaceDirectory) -> None:
    (directory.path / "record.json").unlink()
    assert directory.read_record() is None
    with pytest.raises(RendezvousTimeoutError, match="has not published its address yet") as caught:
        Workspace.attach(ID)
    _require_for_people(caught.value)


# Signs of life


def _attach_by_heartbeat(directory: WorkspaceDirectory, age_s: float) -> RendezvousStaleError:
    then = time.time() - age_s
    os.utime(directory.heartbeat, (then, then))
    with pytest.raises(RendezvousStaleError, match=f"{ID} on n01.invalid") as caught:
        Workspace.attach(ID)
    _require_for_people(caught.value)
    return caught.value


@pytest.mark.parametrize("age_s", [150, 86400])
def test_nobody_attaches_by_a_record_whose_heartbeat_is_old(age_s: int, directory: WorkspaceDirectory) -> None:
    error = _attach_by_heartbeat(directory, age_s)
    (said,) = re.findall(r"gave no sign of life for (\d+) s", error.what)
    assert age_s <= int(said) <= age_s + 10


@pytest.mark.parametrize("age_s", [-86400, -(10**9)])
def test_nobody_attaches_by_a_record_whose_heartbeat_is_of_the_future(
    age_s: int, directory: WorkspaceDirectory
) -> None:
    """The clock of its server was put back, and nothing has touched it since."""
    _attach_by_heartbeat(directory, age_s)


def test_nobody_attaches_by_a_record_that_never_had_a_heartbeat(directory: WorkspaceDirectory) -> None:
    directory.heartbeat.unlink()
    with pytest.raises(RendezvousStaleError, match="no sign of life") as caught:
        Workspace.attach(ID)
    _require_for_people(caught.value)
    assert "for 0 s" not in str(caught.value)


def test_nobody_attaches_to_what_has_ended_and_is_told_why(directory: WorkspaceDirectory) -> None:
    directory.publish(_record(state="ended", exit_reason="nobody used it for 900 s"))
    with pytest.raises(RendezvousStaleError, match="has ended: nobody used it for 900 s"):
        Workspace.attach(ID)


@pytest.mark.parametrize("kind", ["NoSuchError", "Any", "_rebuild", "annotations", ""])
def test_a_failure_of_a_kind_that_is_unknown_is_told_in_its_own_words(kind: str, directory: WorkspaceDirectory) -> None:
    failure = {"kind": kind, "what": "it broke", "evidence": "here", "remedy": "mend it"}
    directory.publish(_record(state="failed", exit_reason="it broke", failure=failure))
    with pytest.raises(WorkspaceError) as caught:
        Workspace.attach(ID)
    assert str(caught.value) == "it broke\nhere\nmend it"


@pytest.mark.parametrize(
    "mark",
    [
        "n01 boot ns ² 3", "n01 boot ns 1 ²", "n01 boot ns ٣ 3", f"n01 boot ns {'9' * 5000} 3", f"n01 boot ns 1 {'9' * 5000}",
        "n01 boot ns -1 3", "n01 boot ns 1 +3", "n01 boot ns 1_0 3",
    ],
)  # fmt: skip
def test_what_only_looks_like_an_owners_mark_is_none(mark: str) -> None:
    assert Owner.parse(mark) is None


# What we write can be read


def test_what_is_too_much_for_a_file_is_refused_where_it_is_given_and_leaves_nothing() -> None:
    many = {"A": "a" * 100_000, "B": "b" * 100_000, "C": "c" * 100_000}
    try:
        directory = WorkspaceDirectory.create(make_spec(), "t", many)
    except WorkspaceError as error:
        _require_for_people(error)
        assert Workspace.list() == []
        with pytest.raises(RendezvousError):
            Workspace.attach(ID)
    else:
        assert directory.read_environment() == many


def test_a_record_that_would_be_too_large_is_cut_or_refused_but_not_published_unreadable(
    directory: WorkspaceDirectory,
) -> None:
    leftovers = [f"/tmp/left-{n:0100}" for n in range(5000)]
    failure = {"kind": "ContainerError", "what": "it broke", "leftovers": leftovers}
    ended = _record(state="failed", exit_reason="it broke", failure=failure)
    try:
        directory.publish(ended)
    except RendezvousError as error:
        _require_for_people(error)
        assert directory.read_record() == _record()
    else:
        record = directory.read_record()
        assert record is not None
        assert record.state == "failed"


def test_a_path_that_is_not_utf8_in_a_spec_is_a_typed_error_and_leaves_nothing() -> None:
    spec = make_spec().model_copy(update={"mount_dir": os.fsdecode(b"/data/caf\xe9")})
    with pytest.raises(WorkspaceError) as caught:
        WorkspaceDirectory.create(spec, "t", {})
    _require_for_people(caught.value)
    with pytest.raises(RendezvousError, match="There is no workspace"):
        Workspace.attach(ID)


def test_the_end_is_published_even_if_its_reason_has_a_path_that_is_not_utf8(directory: WorkspaceDirectory) -> None:
    reason = os.fsdecode(b"/scratch/caf\xe9 is full")
    directory.publish(_record().model_copy(update={"state": "ended", "exit_reason": reason}))
    record = directory.read_record()
    assert record is not None
    assert record.state == "ended"
    assert "is full" in str(record.exit_reason)
