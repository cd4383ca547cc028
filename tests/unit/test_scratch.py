"""A dead node program's scratch goes with the next start; a living one's and a stranger's stay."""

from pathlib import Path

from hpc_workspace.node.scratch import Scratch, remove_stale


def test_only_the_scratch_of_a_dead_owner_is_removed(tmp_path: Path) -> None:
    living, dead, unsaid = Scratch(tmp_path), Scratch(tmp_path), Scratch(tmp_path)
    (dead.path / "owner").write_text("1 0")  # the id of a process that lives, and another one's start
    (dead.overlay / "work").mkdir(mode=0)
    (unsaid.path / "owner").unlink()
    assert remove_stale(tmp_path) == [dead.path]
    assert living.path.is_dir()
    assert unsaid.path.is_dir()
    assert not dead.path.exists()
    assert living.remove() == []
    assert not living.path.exists()
