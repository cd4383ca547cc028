"""What a dead workspace left is found and removed; what lives, or can't be judged, stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_workspace import procfs, teardown
from hpc_workspace.node import leftovers, scratch
from hpc_workspace.node.scratch import Scratch
from hpc_workspace.owner import Owner

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the node side is Linux")

ME = Owner.of(os.getpid())
DEAD = Owner(ME.node, ME.boot_id, ME.pid_namespace, 1, 0)  # the id of a process that lives, and another one's start


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that a dead workspace left: its environment names an owner that is gone."""
    tag = leftovers.tag_value("ws-00000", "x", DEAD)
    process = subprocess.Popen(["sleep", "600"], env={leftovers.TAG_NAME: tag, "PATH": os.environ["PATH"]})
    yield process
    process.kill()
    process.wait()


def test_an_owner_is_read_back_as_it_was_written() -> None:
    assert Owner.parse(str(ME)) == ME


@pytest.mark.parametrize("text", ["", "1 0", "n01 boot ns x 3", "n01 boot ns 1 2 3"])
def test_what_is_no_mark_is_none(text: str) -> None:
    assert Owner.parse(text) is None


@pytest.mark.parametrize(
    ("owner", "fate"),
    [
        (ME, "alive"),
        (DEAD, "dead"),
        (Owner(ME.node, "another boot", ME.pid_namespace, ME.pid, ME.start_ticks), "dead"),
        (Owner("elsewhere", ME.boot_id, ME.pid_namespace, 1, 0), "unknown"),
        (Owner(ME.node, ME.boot_id, "pid:[1]", 1, 0), "unknown"),
    ],
)
def test_an_owner_is_called_dead_only_where_that_can_be_known(owner: Owner, fate: str) -> None:
    assert owner.fate() == fate


def test_only_the_scratch_of_a_dead_owner_is_removed(tmp_path: Path) -> None:
    living, dead, unmarked = Scratch(tmp_path, ME), Scratch(tmp_path, DEAD), Scratch(tmp_path, ME)
    elsewhere = Scratch(tmp_path, Owner("elsewhere", "b", "ns", 1, 0))
    (dead.overlay / "work").mkdir(mode=0)
    (unmarked.path / "owner").unlink()
    assert leftovers.clear(leftovers.is_stale, [tmp_path]).removed == [str(dead.path)]
    assert not dead.path.exists()
    assert all(kept.path.is_dir() for kept in (living, unmarked, elsewhere))


def test_an_unmarked_directory_goes_once_it_is_old(tmp_path: Path) -> None:
    old = Scratch(tmp_path, ME)
    (old.path / "owner").unlink()
    os.utime(old.path, (0, 0))
    assert leftovers.clear(leftovers.is_stale, [tmp_path]).removed == [str(old.path)]


def test_a_link_with_the_name_of_a_scratch_is_left_alone(tmp_path: Path) -> None:
    target = Scratch(tmp_path / ".", DEAD).path.rename(tmp_path / "precious")
    (tmp_path / "hpcws-link").symlink_to(target)
    assert leftovers.clear(leftovers.is_stale, [tmp_path]).removed == []
    assert target.is_dir()


def test_a_dead_owners_process_is_ended(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    cleared = leftovers.clear(lambda owner: owner == DEAD, [tmp_path])
    assert f"process {sleeper.pid} (sleep)" in cleared.ended
    assert cleared.left == []
    assert procfs.read_process(sleeper.pid) is None


def test_a_process_of_another_owner_lives_on(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    leftovers.clear(lambda owner: owner == ME, [tmp_path])
    assert sleeper.poll() is None


def test_no_signal_reaches_a_later_process_with_the_same_id(sleeper: subprocess.Popen[bytes]) -> None:
    earlier = procfs.Process(sleeper.pid, os.getpid(), "S", 1, "sleep")
    teardown.send_signal(earlier, 9)
    assert sleeper.poll() is None


def test_the_base_with_the_most_room_is_chosen_and_the_first_of_equals(tmp_path: Path) -> None:
    assert scratch.choose_base({"TMPDIR": str(tmp_path), "SLURM_TMPDIR": "/nowhere"}) in (tmp_path, Path("/tmp"))
    same = tmp_path / "a"
    same.mkdir()
    assert scratch.choose_base({"SLURM_TMPDIR": str(same), "TMPDIR": str(tmp_path)}) in (same, Path("/tmp"))
    assert scratch.candidate_bases({"TMPDIR": "/tmp"}) == [Path("/tmp")]


def test_a_scratch_that_two_starts_find_is_removed_once_and_nobody_fails(tmp_path: Path) -> None:
    dead = Scratch(tmp_path, DEAD)
    (tmp_path / "link").symlink_to(tmp_path)
    assert leftovers.clear(leftovers.is_stale, [tmp_path, tmp_path / "link"]).removed == [str(dead.path)]
    assert scratch.remove_scratch(dead.path) == []


def test_what_a_scratch_lies_in_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    dead = Scratch(tmp_path, DEAD)
    (dead.path / "run").chmod(0)
    leftovers.clear(leftovers.is_stale, [tmp_path])
    assert not dead.path.exists()
    assert tmp_path.stat().st_mode & 0o7777 == 0o2775


def test_a_mark_that_can_not_be_read_is_not_nobodys(tmp_path: Path) -> None:
    living = Scratch(tmp_path, ME)
    (living.path / "owner").unlink()
    (living.path / "owner").symlink_to("owner")  # ELOOP: an error, and not "no such file"
    os.utime(living.path, (0, 0))
    assert leftovers.clear(leftovers.is_stale, [tmp_path]).removed == []
    assert living.path.is_dir()
