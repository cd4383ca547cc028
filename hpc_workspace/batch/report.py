"""What a run has come to: values, and the files that are derived from the run's directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hpc_workspace.batch.outcomes import AGENT_CLASSES, INFRA_CLASSES, Standing
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.batch.state import RunReader, RunState

_SHOWN_ERROR = 2000
_KEPT = {"result", "node", "started_at", "duration_s", "agent_s", "phases_s", "peaks"}


@dataclass(frozen=True)
class Report:
    """How a run stands.

    Attributes:
        results: one line for each task that stands where it stays, as in results.jsonl.
        missing: the ids of the others.
        attempts: how many attempts there were, by how they ended: `done`, a failure class, or `running`.
        max_infra_loss: the share of tasks that may stay lost to the infrastructure.
    """

    results: list[dict[str, Any]]
    missing: list[str]
    attempts: dict[str, int] = field(default_factory=dict)
    max_infra_loss: float = 0.05

    @property
    def counts(self) -> dict[str, int]:
        """Tasks by `done` or their failure class."""
        return dict(Counter(line["failure_class"] or "done" for line in self.results))

    @property
    def agent_failures(self) -> int:
        """Tasks that the agent had its chance at, and failed."""
        return sum(self.counts.get(name, 0) for name in AGENT_CLASSES)

    @property
    def infra_losses(self) -> int:
        """Tasks that stay failed for reasons that are not the agent's: no part of its score."""
        return sum(self.counts.get(name, 0) for name in INFRA_CLASSES)

    @property
    def infra_loss(self) -> float:
        """Their share of all tasks that stand where they stay; 0 where none does."""
        return self.infra_losses / len(self.results) if self.results else 0.0

    @property
    def attempts_lost(self) -> int:
        """Attempts that were lost to the infrastructure, most of them made good by another."""
        return sum(self.attempts.get(name, 0) for name in INFRA_CLASSES)

    @property
    def is_complete(self) -> bool:
        return not self.missing

    @property
    def is_trustworthy(self) -> bool:
        """Whether no more was lost to the infrastructure than was allowed, and nothing is missing."""
        return self.is_complete and self.infra_loss <= self.max_infra_loss

    def as_json(self) -> dict[str, Any]:
        """report.json: the counts, without the tasks."""
        return {
            "tasks": len(self.results) + len(self.missing),
            "missing": len(self.missing),
            "counts": self.counts,
            "agent_failures": self.agent_failures,
            "infra_losses": self.infra_losses,
            "infra_loss": round(self.infra_loss, 6),
            "max_infra_loss": self.max_infra_loss,
            "attempts": self.attempts,
            "attempts_lost": self.attempts_lost,
            "is_complete": self.is_complete,
            "is_trustworthy": self.is_trustworthy,
        }


def make_report(state: RunState, max_infra_loss: float = 0.05) -> Report:
    """The report of a run at one moment."""
    results = [_line(name, standing) for name, standing in state.standings.items() if standing.is_final]
    missing = [name for name, standing in state.standings.items() if not standing.is_final]
    ends: Counter[str] = Counter()
    for attempts in state.attempts.values():
        for attempt in attempts:
            ends["running" if attempt.is_running else attempt.failure_class or "done"] += 1
    return Report(results, missing, dict(ends), max_infra_loss)


def derive(run: RunDir) -> Report:
    """Write results.jsonl, report.json, preds.jsonl, report.md and report.html anew from what is there.

    Returns:
        The report.

    Raises:
        OSError: the directory can't be read or written.
    """
    from hpc_workspace.batch.pages import write_pages  # it is drawn from what is defined here

    about = run.read_run()
    state = RunReader(run).read()
    report = make_report(state, float(about.get("max_infra_loss", 0.05)))
    run.write_derived("results.jsonl", (json.dumps(line) for line in report.results))
    run.write_derived("report.json", [json.dumps(report.as_json(), indent=1)])
    run.write_derived("preds.jsonl", _predictions(run, state, str(about.get("started_by", ""))))
    write_pages(run, report, state, about)
    return report


def _line(task_id: str, standing: Standing) -> dict[str, Any]:
    attempt = standing.attempt
    record = attempt.record if attempt is not None else None
    line: dict[str, Any] = {
        "task": task_id,
        "attempt": attempt.number if attempt is not None else 0,
        "status": standing.state,
        "failure_class": None if standing.state == "done" or attempt is None else attempt.failure_class,
        "result": None,
        "error": "",
        "pilot": attempt.pilot if attempt is not None else "",
    }
    if record is not None:
        line |= record.model_dump(include=_KEPT)
        line["error"] = record.error[-_SHOWN_ERROR:]
    return line


def _predictions(run: RunDir, state: RunState, model: str) -> Iterator[str]:
    """SWE-bench's form: the patch of each task whose attempt left one, or whose result has one as `model_patch`."""
    for name, standing in state.standings.items():
        attempt = standing.attempt
        if standing.state != "done" or attempt is None or attempt.record is None:
            continue
        result = attempt.record.result
        patch = result.get("model_patch") if isinstance(result, dict) else None
        if patch is None:
            try:
                patch = (run.attempt_dir(name, attempt.number) / "patch").read_bytes().decode("utf-8", "replace")
            except FileNotFoundError:
                continue
        label = result.get("model_name_or_path", model) if isinstance(result, dict) else model
        yield json.dumps({"instance_id": name, "model_name_or_path": label, "model_patch": patch})
