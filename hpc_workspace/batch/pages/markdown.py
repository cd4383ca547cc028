"""report.md: the report's words and tables in Markdown. Text from outside can be neither markup nor HTML in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpc_workspace.batch.pages import tables, words
from hpc_workspace.batch.pages.markup import visible
from hpc_workspace.batch.state import RunState

if TYPE_CHECKING:
    from hpc_workspace.batch.report import Report

# CommonMark: any of ASCII's punctuation can be escaped by a backslash. Those that mean nothing within a line are left.
_SPECIAL = re.compile(r"[\\`*_{}\[\]()#!|~<>&$@]")


def plain(text: str) -> str:
    """`text` as Markdown that shows it as it is."""
    return _SPECIAL.sub(lambda found: f"\\{found[0]}", visible(text)).replace("://", ":\\//")


def lines(report: Report, state: RunState, about: Mapping[str, Any]) -> Iterator[str]:
    """The file's lines."""
    head = tables.headline(report, state)
    total = len(report.results) + len(report.missing)
    yield "# Batch run"
    yield ""
    yield f"**{plain(head.verdict)}**"
    yield ""
    for reason in head.reasons:
        yield f"- {plain(reason)}"
    if head.reasons:
        yield ""
    yield (
        f"{words.count(total, 'task')}: {report.counts.get('done', 0):,} done, "
        f"{words.count(report.agent_failures, 'failure')} of the agent's own, "
        f"{report.infra_losses:,} lost to the infrastructure, {len(report.missing):,} not at an end."
    )
    yield ""
    yield "The same with plots: [report.html](report.html). For programs: report.json, results.jsonl, preds.jsonl."
    yield ""
    for name, value in tables.facts(report, state, about):
        yield f"- {plain(name)}: {plain(value)}"
    for table in tables.all_tables(report, state):
        yield from _table(table)


def _table(table: tables.Table) -> Iterator[str]:
    yield ""
    yield f"## {plain(table.title)}"
    yield ""
    if table.rows:
        yield _line([title.removeprefix(">") for title in table.columns])
        yield "|" + "|".join("---:" if title.startswith(">") else "---" for title in table.columns) + "|"
        for row in table.rows:
            yield _row(row, len(table.columns))
    else:
        yield "Nothing."
    if table.note:
        yield ""
        yield plain(table.note)


def _row(row: tables.Row, width: int) -> str:
    texts = [_cell(cell) for cell in row.cells]
    if row.is_heading:
        texts = [f"**{texts[0]}**", *[""] * (width - 1)]
    return "| " + " | ".join(texts) + " |"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(plain, texts)) + " |"


def _cell(cell: tables.Cell | Sequence[tables.Cell]) -> str:
    if not isinstance(cell, tables.Cell):
        return ", ".join(map(_cell, cell))
    # In angle brackets a destination may have parentheses; what else could end it is quoted already.
    return f"[{plain(cell.text)}](<{cell.link}>)" if cell.link is not None else plain(cell.text)
