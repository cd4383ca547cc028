"""Claims: one does the work and the others wait, whoever is killed meanwhile. Real threads, processes and files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc_workspace import claims, files
from hpc_workspace.owner import Owner
from tests.unit.images.pulling import at_once
from tests.unit.server.running import eventually

ME = Owner.of(os.getpid())
DEAD = Owner(ME.node, ME.boot_id, ME.pid_namespace, 1, 0)
ELSEWHERE = Owner("n99+0", ME.boot_id, ME.pid_namespace, ME.pid, ME.start_ticks)
MINUTE_S = 60

# Works on `x` in a directory once a line comes; what it makes is a file, and each making a line of another one.
ONCE = """
import sys, threading
from pathlib import Path
from hpc_workspace import claims
folder = Path(sys.argv[1])
made = folder.parent / "made"

def make():
    with (folder.parent / "log").open("a") as log:
        log.write("made\\n")
    aside = made.with_suffix(f".{threading.get_ident()}")
    aside.write_text("value")
    aside.replace(made)
    return "value"

def work():
    results.append(claims.once(folder, "x", find=lambda: made.read_text() if made.exists() else None, make=make,
                               on_wait=lambda who: None))

results = []
threads = [threading.Thread(target=work) for _ in range(4)]
print("ready", flush=True)
sys.stdin.readline()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*results)
"""

HOLD = """
import sys
from pathlib import Path
from hpc_workspace import claims
print(claims.take(Path(sys.argv[1]), "x") is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "claims").mkdir()
    return tmp_path / "claims"


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process of this machine that holds `x`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def claim_of(folder: Path, owner: Owner, number: int = 1, age_s: float = 0) -> Path:
    """A claim on `x`, as if `owner` had made it, last touched so long ago."""
    path = folder / f"x.{number}"
    path.write_text(f"{owner}\nn99\n")
    then = files.server_time_s(folder) - age_s
    os.utime(path, (then, then))
    return path


class Work:
    """Something that is to be made once: `gate` lets its makers go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.value: str | None = None
        self.makings = 0
        self.waited_for: list[str] = []
        self.gate = threading.Event()

    def make(self) -> str:
        self.makings += 1
        assert self.gate.wait(10)
        self.value = "value"
        return self.value

    def once(self, make: Callable[[], str] | None = None, timeout_s: float | None = None) -> str:
        return claims.once(
            self.folder,
            "x",
            find=lambda: self.value,
            make=make or self.make,
            on_wait=self.waited_for.append,
            timeout_s=timeout_s,
        )


def test_twenty_threads_make_it_once(folder: Path) -> None:
    work = Work(folder)
    running = at_once([work.once] * 20)
    eventually(lambda: len(work.waited_for) == 19)
    work.gate.set()
    assert running.join() == ["value"] * 20
    assert work.makings == 1
    assert set(work.waited_for) == {f"process {os.getpid()} on {os.uname().nodename}"}
    assert not list(folder.iterdir())


def test_four_processes_of_four_threads_make_it_once(folder: Path) -> None:
    argv = [sys.executable, "-c", ONCE, str(folder)]
    processes = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    outputs = []
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate(timeout=30)[0].split())
    assert outputs == [["value"] * 4] * 4
    assert (folder.parent / "log").read_text() == "made\n"
    assert not list(folder.iterdir())


def test_what_is_there_is_taken_without_a_claim(folder: Path) -> None:
    work = Work(folder)
    work.value = "there"
    folder.rmdir()  # nothing could be claimed
    assert work.once() == "there"
    assert work.makings == 0


def test_a_makers_error_is_its_own_and_the_next_who_waits_makes_it(folder: Path) -> None:
    work = Work(folder)

    def make() -> str:
        work.makings += 1
        if work.makings > 1:
            return "second"
        assert work.gate.wait(10)
        raise ValueError("the first one's own")

    running = at_once([lambda: work.once(make)] * 2)
    eventually(lambda: work.waited_for)
    work.gate.set()
    results = running.join()
    assert sorted(map(repr, results)) == ["'second'", """ValueError("the first one's own")"""]
    assert not list(folder.iterdir())


def test_waiting_ends_with_the_timeout_and_says_for_whom(folder: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(TimeoutError, match=f"process {holder.pid} on {os.uname().nodename} did not finish it"):
        Work(folder).once(timeout_s=0.1)


def test_a_holder_that_was_killed_is_followed_at_once(folder: Path, holder: subprocess.Popen[str]) -> None:
    assert claims.take(folder, "x") is None
    assert claims.is_held(folder, "x")
    holder.kill()
    holder.wait()
    assert not claims.is_held(folder, "x")
    claim = claims.take(folder, "x")
    assert claim is not None
    assert [path.name for path in folder.iterdir()] == ["x.2"]
    claim.close()
    assert not list(folder.iterdir())


def test_who_waits_for_a_holder_that_is_killed_makes_it(folder: Path, holder: subprocess.Popen[str]) -> None:
    work = Work(folder)
    work.gate.set()
    running = at_once([work.once] * 3)
    eventually(lambda: len(work.waited_for) == 3)
    holder.kill()
    assert running.join() == ["value"] * 3  # while it is a zombie: nobody has waited for it yet
    assert work.makings == 1


@pytest.mark.parametrize(
    ("owner", "age_s", "is_held"),
    [
        (ME, 10 * MINUTE_S, True),  # alive, however long it takes
        (DEAD, 0, False),
        (Owner(ME.node, "another-boot", ME.pid_namespace, ME.pid, ME.start_ticks), 0, False),
        (ELSEWHERE, 0, True),
        (ELSEWHERE, MINUTE_S - 5, True),
        (ELSEWHERE, MINUTE_S + 5, False),
        (Owner(ME.node, ME.boot_id, "pid:[1]", ME.pid, ME.start_ticks), MINUTE_S - 5, True),  # in another container
        (Owner(ME.node, ME.boot_id, "pid:[1]", ME.pid, ME.start_ticks), MINUTE_S + 5, False),
    ],
)
def test_a_claim_is_followed_only_where_its_holder_is_dead_or_silent_for_a_minute(
    folder: Path, owner: Owner, age_s: float, is_held: bool
) -> None:
    claim_of(folder, owner, age_s=age_s)
    assert claims.is_held(folder, "x") == is_held
    claim = claims.take(folder, "x")
    assert (claim is None) == is_held
    if claim is not None:
        claim.close()
        assert not list(folder.iterdir())


@pytest.mark.parametrize("text", ["", "\n", "half of an own", "\udcff"])
def test_a_claim_that_can_not_be_read_yet_is_held_for_a_minute(folder: Path, text: str) -> None:
    path = folder / "x.1"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert claims.take(folder, "x") is None
    then = files.server_time_s(folder) - MINUTE_S - 5
    os.utime(path, (then, then))
    claim = claims.take(folder, "x")
    assert claim is not None
    claim.close()


@pytest.mark.parametrize("owner", [DEAD, ELSEWHERE])
def test_an_abandoned_claim_is_taken_by_exactly_one_of_many(folder: Path, owner: Owner) -> None:
    claim_of(folder, owner, number=3, age_s=MINUTE_S + 5)
    taken = [claim for claim in at_once([lambda: claims.take(folder, "x")] * 20).join() if claim is not None]
    (claim,) = taken
    assert isinstance(claim, claims.Claim)
    assert claim.path.name == "x.4"
    assert [path.name for path in folder.iterdir()] == ["x.4"]
    claim.close()
    assert not list(folder.iterdir())


def test_the_highest_generation_counts(folder: Path) -> None:
    claim_of(folder, DEAD, number=9)
    claim_of(folder, ME, number=10)  # as numbers: x.9 is the later word
    assert claims.is_held(folder, "x")
    assert claims.take(folder, "x") is None
    claim_of(folder, DEAD, number=11)
    assert not claims.is_held(folder, "x")
    claim = claims.take(folder, "x")
    assert claim is not None
    assert [path.name for path in folder.iterdir()] == ["x.12"]
    claim.close()


def test_names_do_not_know_each_other(folder: Path) -> None:
    held = [claims.take(folder, name) for name in ("x", "x.y", "x-1", "xx")]
    assert None not in held
    assert claims.names(folder) == {"x", "x.y", "x-1", "xx"}
    assert not claims.is_held(folder, "y")
    for claim in held:
        assert claim is not None
        claim.close()
    assert claims.names(folder) == set()


def test_a_claim_that_its_follower_removed_is_let_go_without_a_sound(folder: Path) -> None:
    claim = claims.take(folder, "x")
    assert claim is not None
    claim.path.unlink()
    claim.close()
    claim.close()


def test_what_dead_holders_left_is_removed_and_nothing_else(folder: Path) -> None:
    claim_of(folder, DEAD, number=1)
    claim_of(folder, ELSEWHERE, number=2, age_s=MINUTE_S + 5)
    claim_of(folder, ELSEWHERE, number=3)
    (folder / "y.1").write_text(f"{ME}\nhere\n")
    assert claims.remove_abandoned(folder) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["x.3", "y.1"]


def test_a_directory_that_is_not_there_has_no_claims_and_takes_none(tmp_path: Path) -> None:
    assert claims.names(tmp_path / "nosuch") == set()
    with pytest.raises(OSError) as caught:
        claims.take(tmp_path / "nosuch", "x")
    assert caught.value.errno == errno.ENOENT


# --- the files below them ---


def test_a_file_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [bytes([65 + i]) * 200_000 for i in range(4)]
    files.write_whole(path, texts[0])
    ended = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not ended.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        at_once([lambda text=text: [files.write_whole(path, text) for _ in range(5)] for text in texts]).join()
    finally:
        ended.set()
        reader.join()
    assert seen <= set(texts)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "x").touch()
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "file", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_age_is_told_by_the_clock_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    now_s = files.server_time_s(tmp_path)
    os.utime(path, (now_s - 100, now_s - 100))
    assert 100 <= files.age_s(path) < 110
    os.utime(path, (now_s + 100, now_s + 100))
    assert -100 <= files.age_s(path) < -90  # somebody else set it
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
