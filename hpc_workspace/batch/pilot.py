"""A pilot: claims tasks and gives each a new workspace on its own node, until no task is left."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_workspace import clock
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.errors import ImageError, WorkspaceError
from hpc_workspace.workspace import ApptainerWorkspace, Workspace

Agent = Callable[[Workspace, dict[str, Any]], Any]


@dataclass(frozen=True)
class Pilot:
    """What one array task runs; pickled by submitit. `cwd` and `import_path` are the caller's."""

    agent: Agent
    run_dir: Path
    options: Mapping[str, Any]
    workspaces: int
    cwd: str
    import_path: tuple[str, ...]

    def __call__(self, index: int) -> int:
        """Work until no task is left. Returns how many tasks this pilot finished."""
        sys.path[:] = [*self.import_path, *(path for path in sys.path if path not in self.import_path)]
        os.chdir(self.cwd)
        with ThreadPoolExecutor(self.workspaces) as pool:
            return sum(pool.map(lambda _: self._work(), range(self.workspaces)))

    def _work(self) -> int:
        run_dir = RunDir(self.run_dir)
        done = 0
        while (task_id := run_dir.claim_next()) is not None:
            number = run_dir.start_attempt(task_id)
            run_dir.finish_attempt(task_id, number, self._attempt(task_id, number, run_dir.task(task_id)))
            done += 1
        return done

    def _attempt(self, task_id: str, number: int, task: dict[str, Any]) -> dict[str, Any]:
        """One attempt in a workspace of its own; its record."""
        began_s, wall_s = clock.now_s(), clock.wall_s()
        result: Any = None
        failure: str | None = None
        error = ""
        workspace = ApptainerWorkspace(**self.options)
        try:
            with workspace:
                try:
                    result = self.agent(workspace, task)
                except WorkspaceError:
                    raise
                except Exception:  # noqa: BLE001 - the agent is the user's own: whatever it raises is its result
                    failure, error = "agent", traceback.format_exc()
        except ImageError as caught:
            failure, error = "image", str(caught)
        except WorkspaceError as caught:
            failure, error = ("lost" if "start" in workspace.phases_s else "start"), str(caught)
        return {
            "task": task_id,
            "attempt": number,
            "status": "failed" if failure else "done",
            "failure_class": failure,
            "result": result,
            "error": error,
            "started_at": wall_s,
            "duration_s": round(clock.now_s() - began_s, 3),
            "phases_s": {name: round(seconds, 3) for name, seconds in workspace.phases_s.items()},
        }
