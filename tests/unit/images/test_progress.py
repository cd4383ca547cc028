"""Progress as lines: each new thing that happens, and not a line for every chunk."""

from __future__ import annotations

from hpc_workspace.images.progress import Step, as_lines


def test_a_line_is_said_for_each_new_text_and_not_for_each_step() -> None:
    said: list[str] = []
    tell = as_lines(said.append)
    tell(Step("a", "asking x"))
    for done in range(0, 3_000_000, 1000):
        tell(Step("a", "downloading", done, 3_000_000))
    tell(Step("a", "converting to SIF"))
    tell(Step("a", "converting to SIF"))
    assert said == ["a: asking x", "a: downloading 3.0 MB", "a: converting to SIF"]


def test_images_do_not_hide_each_others_lines() -> None:
    said: list[str] = []
    tell = as_lines(said.append)
    for reference in ("a", "b", "a", "b"):
        tell(Step(reference, "downloading", 500, 2000))
    assert said == ["a: downloading 500 B of 2.0 kB", "b: downloading 500 B of 2.0 kB"]
