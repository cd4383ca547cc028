"""The report for people: report.md and report.html, from a run's state alone. What it shows can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpc_workspace.batch.pages import html, markdown
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.batch.state import RunState

if TYPE_CHECKING:
    from hpc_workspace.batch.report import Report


def write_pages(run: RunDir, report: Report, state: RunState, about: Mapping[str, Any]) -> None:
    """Write report.md and report.html anew.

    Args:
        report: of the same state.
        about: run.json.

    Raises:
        OSError: the directory can't be written.
    """
    run.write_derived("report.md", markdown.lines(report, state, about))
    run.write_derived("report.html", [html.page(report, state, about)])


__all__ = ["write_pages"]
