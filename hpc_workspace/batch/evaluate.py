"""`evaluate`: prepare the run, send the pilots, derive the report."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_workspace.batch.pilot import Agent, Pilot
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.config import load_settings
from hpc_workspace.options import SlurmOptions, WorkspaceOptions
from hpc_workspace.request import prepare_image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """How a run stands: one line a task in `results`, as in results.jsonl; `missing` have no record yet."""

    results: list[dict[str, Any]]
    missing: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """Tasks by `done` or their failure class."""
        return dict(Counter(line["failure_class"] or "done" for line in self.results))


def evaluate(
    agent: Agent,
    tasks: Iterable[Mapping[str, Any]],
    *,
    run_dir: str | Path,
    image: str | None = None,
    slurm: SlurmOptions | None = None,
    pilots: int = 1,
    workspaces_per_pilot: int = 1,
    **options: Any,
) -> Report:
    """Run `agent(workspace, task)` over all tasks, each in a new workspace, and report.

    The same call again goes on where an earlier one ended: tasks with a record are not run again.

    Args:
        agent: returns what JSON can hold; an exception of its own is a failure of class `agent`.
        tasks: dicts with an `id` each.
        image: as in `ApptainerWorkspace`; left out only with `runtime="process"`.
        slurm: where the pilots run; None: on this machine.
        pilots: how many jobs of the array.
        workspaces_per_pilot: how many tasks each works on at once.
        options: further options of `ApptainerWorkspace`.

    Raises:
        ConfigError: an option or a task's id is wrong; nothing was started.
        ImageError: the image can't be had; it is fetched once, before any pilot starts.
        JobEndedError: a pilot ended without a result; its unfinished tasks run in the next call.
    """
    from hpc_workspace.batch.arrays import run_array

    chosen = {**options, **({"image": image} if image else {})}
    settings = load_settings()
    chosen = settings.fill_in(chosen)
    WorkspaceOptions(**chosen)
    slurm = settings.fill_in_slurm(slurm) if slurm is not None else None
    run = RunDir(Path(run_dir))
    run.prepare(tasks)
    run.release_claims()
    try:
        if left := run.unfinished():
            ready = prepare_image(chosen, slurm=slurm, say=log.info)
            pilot = Pilot(agent, run.path, ready, workspaces_per_pilot, str(Path.cwd()), tuple(map(str, sys.path)))
            run_array(pilot, min(pilots, len(left)), run.path / "pilots", slurm)
    finally:
        results = run.write_results()
    return Report(results, run.unfinished())


__all__ = ["Report", "evaluate"]
