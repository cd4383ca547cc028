"""docs/options.md: every option is there, and each row's argv is what it gives."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_workspace.node.leftovers import TAG_NAME
from hpc_workspace.node.plan import Ingredients, make_plan
from hpc_workspace.node.scratch import Scratch
from hpc_workspace.options import WorkspaceOptions
from hpc_workspace.owner import Owner
from hpc_workspace.request import make_spec

TEXT = (Path(__file__).parents[2] / "docs/options.md").read_text()
ROWS = [
    (match[1], bool(match[2]), re.findall(r"`([^`]+)`", match[3]))
    for match in re.finditer(r"^\| `([^`]+)`( \(default\))? \| .* \| ([^|]*) \|$", TEXT, re.MULTILINE)
]


def test_every_option_is_in_the_docs() -> None:
    named = set(re.findall(r"^\| `(\w+)=", TEXT, re.MULTILINE))
    assert named == set(WorkspaceOptions.model_fields)


@pytest.fixture(scope="module")
def argv_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The argv that options give, on a node with an Apptainer that is a name on PATH and an image that is a header."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("apptainer", "singularity"):
        (root / name).write_text("#!/bin/sh\n")
        (root / name).chmod(0o755)
    (root / "app.sif").write_bytes(bytes(32) + b"SIF_MAGIC")
    (root / "key.pem").touch()
    (root / "data").mkdir()

    def build(given: str) -> list[str]:
        given = given.replace('server_image="ghcr.io/…"', 'sif_file="app.sif"').replace("/data", str(root / "data"))
        call = ast.parse(f"dict({given})", mode="eval").body
        assert isinstance(call, ast.Call)
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if not options.keys() & {"image", "sif_file"}:
            options["image"] = "app.sif"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(root), prepend=":")
            patch.setenv("HPC_WORKSPACE_CACHE", str(root / "cache"))
            patch.chdir(root)
            spec = make_spec(WorkspaceOptions(**options), slurm=None, say=print)
            scratch = Scratch(root, Owner("n", "b", "ns", 1, 0))
            ingredients = Ingredients(scratch, "t0ken", {}, {}, (TAG_NAME, "x"))
            argv = make_plan(spec, ingredients).argv
        replaced = {str(scratch.path): "SCRATCH", str(root / "data"): "/data", str(root) + "/": ""}
        for path, name in replaced.items():
            argv = [part.replace(path, name) for part in argv]
        return [re.sub(r"config-[0-9a-f]+", "config", part) for part in argv]

    return build


@pytest.mark.parametrize(("given", "is_default", "cells"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_says_what_the_option_adds(
    argv_of: Callable[[str], list[str]], given: str, is_default: bool, cells: list[str]
) -> None:
    argv, without = " ".join(argv_of(given)), " ".join(argv_of(""))
    assert "t0ken" not in argv
    if is_default:
        assert argv == without
    for cell in cells:
        said = " ".join(shlex.split(cell))
        assert f" {said} " in f" {argv} "
        if not is_default and not given.startswith("image"):
            assert f" {said} " not in f" {without} "
