"""A workspace's start and end on this node, beside the container alone (`benchmarks/start.py` has its death too)."""

from __future__ import annotations

from benchmarks.harness.places import TINY, Places
from benchmarks.harness.values import Contestant, Measure, Row


def _whole_ms(part: str) -> Measure:
    return lambda places: float(places.beside.ask("start", image=TINY)[part]) * 1000


def _bare_ms(places: Places) -> float:
    return float(places.starter.ask("bare_start", image=TINY)["took_s"]) * 1000


ROWS: tuple[Row, ...] = (
    Row(
        name="start",
        what="`start()`, bundled server, to the first answer",
        unit="ms",
        node="n01",
        contestants=(
            Contestant("start()", "ours", _whole_ms("start_s")),
            Contestant("the container with its server alone", "floor", _bare_ms),
        ),
        rounds=10,
    ),
    Row(
        name="close",
        what="`close()`, everything gone and looked for twice",
        unit="ms",
        node="n01",
        contestants=(Contestant("close()", "ours", _whole_ms("close_s")),),
        rounds=10,
    ),
)
