"""What it takes to be there: the import, and the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness.floors import spawned_s
from benchmarks.harness.places import Places
from benchmarks.harness.values import Contestant, Goal, Measure, Row
from hpc_workspace import processes

_IMPORT = "from hpc_workspace import ApptainerWorkspace, SlurmOptions"
_LINES = 40


def _python_ms(code: str) -> Measure:
    return lambda _: spawned_s([sys.executable, "-c", code]) * 1000


def _program() -> str:
    return str(Path(sys.executable).with_name("hpc-workspace"))


def _import_profile(*argv: str) -> str:
    """The slowest imports of a program, as `-X importtime` tells them."""
    said = processes.run([sys.executable, "-X", "importtime", *argv], timeout_s=60).stderr
    lines = [line for line in said.splitlines() if line.startswith("import time:") and "|" in line]
    told = [line for line in lines if line.split("|")[1].strip().isdigit()]
    slowest = sorted(told, key=lambda line: -int(line.split("|")[1]))[:_LINES]
    return "\n".join(["self [us] | cumulative | module, slowest first", *slowest]) + "\n"


def _of_import(_: Places) -> str:
    return _import_profile("-c", _IMPORT)


def _of_help(_: Places) -> str:
    return _import_profile(_program(), "--help")


_BARE = Contestant("bare `python -c pass`", "floor", _python_ms("pass"))

ROWS: tuple[Row, ...] = (
    Row(
        name="import",
        what=f"`python -c '{_IMPORT}'`, the whole process",
        unit="ms",
        node="n01",
        contestants=(Contestant("import", "ours", _python_ms(_IMPORT)), _BARE),
        goals=(Goal("figure", 100.0),),
        rounds=50,
        profile=_of_import,
    ),
    Row(
        name="help",
        what="`hpc-workspace --help`",
        unit="ms",
        node="n01",
        contestants=(
            Contestant("--help", "ours", lambda _: spawned_s([_program(), "--help"]) * 1000),
            _BARE,
        ),
        goals=(Goal("figure", 250.0),),
        rounds=50,
        profile=_of_help,
    ),
)
