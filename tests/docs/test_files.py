"""The table of docs/files.md: each test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).parents[2]
HOLDERS = (
    *(REPO / "tests/unit").glob("test_t*.py"),
    REPO / "tests/contract/behaviours.py",
    REPO / "tests/integration/test_files.py",
)


def test_every_test_that_the_table_of_files_names_is_there() -> None:
    named = set(re.findall(r"`((?:it|test)_[a-z0-9_]{12,})`", (REPO / "docs/files.md").read_text()))
    there = {name for path in HOLDERS for name in re.findall(r"def (\w+)\(", path.read_text())}
    assert len(named) > 15
    assert named <= there, named - there
