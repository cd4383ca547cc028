"""One attempt, in a process of its own: a new workspace, the agent in it, and what is kept of it."""

from __future__ import annotations

import asyncio
import inspect
import json
import shlex
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_workspace import clock
from hpc_workspace.batch.outcomes import AttemptRecord
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.errors import ImageError, WorkspaceError
from hpc_workspace.workspace import ApptainerWorkspace, Workspace

Agent = Callable[[Workspace, dict[str, Any]], Any]


@dataclass(frozen=True)
class Job:
    """What every attempt of a run has in common; travels to the pilots.

    Attributes:
        agent: called with an open workspace and the task; its result must be what JSON can hold.
        options: of each `ApptainerWorkspace`, with the image as a path.
        images: what takes the image's place for single tasks, by task id.
        patch: the repository inside whose changes are kept as `patch`; None: none is.
        collect: files of the workspace that are kept under `files/`, where they exist.
    """

    agent: Agent
    options: Mapping[str, Any]
    images: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    patch: str | None = None
    collect: Sequence[str] = ()

    def options_for(self, task_id: str) -> dict[str, Any]:
        """The options of this task's workspace."""
        return {**self.options, **self.images.get(task_id, {})}


def run_attempt(job: Job, run: RunDir, task: dict[str, Any], number: int, *, pilot: str, node: str, slot: int) -> None:
    """Run it to its end, and write its record.

    Nothing is written when it is ended from outside (SystemExit, KeyboardInterrupt): that is no result.
    """
    folder = run.begin_attempt(task["id"], number)
    began_s, wall_s = clock.now_s(), clock.wall_s()
    outcome = _Outcome()
    workspace = ApptainerWorkspace(**job.options_for(task["id"]))
    try:
        with workspace:
            outcome.run(job, workspace, task, folder)
    except ImageError as error:
        outcome.fail("image", str(error))
    except WorkspaceError as error:
        outcome.fail("lost" if "start" in workspace.phases_s else "start", str(error))
    record = AttemptRecord(
        task=task["id"],
        attempt=number,
        status="failed" if outcome.failure_class else "done",
        failure_class=outcome.failure_class,
        result=outcome.result,
        error=outcome.error,
        pilot=pilot,
        node=node,
        slot=slot,
        started_at=wall_s,
        duration_s=round(clock.now_s() - began_s, 3),
        agent_s=outcome.agent_s,
        phases_s={name: round(seconds, 3) for name, seconds in workspace.phases_s.items()},
    )
    run.write_record(record)


class _Outcome:
    """What has come of an attempt until now."""

    def __init__(self) -> None:
        self.result: Any = None
        self.failure_class: str | None = None
        self.error = ""
        self.agent_s: float | None = None

    def fail(self, failure_class: str, error: str) -> None:
        """The first failure counts: a sandbox that is lost under an agent makes that fail as well."""
        if self.failure_class is None:
            self.failure_class, self.error, self.result = failure_class, error[-20_000:], None

    def run(self, job: Job, workspace: Workspace, task: dict[str, Any], folder: Path) -> None:
        began_s = clock.now_s()
        try:
            result = _call(job.agent, workspace, dict(task))
            self.result = json.loads(json.dumps(result))
        except WorkspaceError as error:
            # A command that can't be started is the agent's own doing; a sandbox that is gone is not.
            self.fail("lost" if not workspace.alive else "agent", f"{traceback.format_exc()}\n{error}")
        except Exception:  # noqa: BLE001 - the agent is the user's own: whatever it raises is its result
            self.fail("agent", traceback.format_exc())
        finally:
            self.agent_s = round(clock.now_s() - began_s, 3)
        if self.failure_class != "lost":
            self._keep(job, workspace, folder)

    def _keep(self, job: Job, workspace: Workspace, folder: Path) -> None:
        """What is wanted of the sandbox, before it is gone; a failed agent's too."""
        try:
            if job.patch is not None:
                (folder / "patch").write_bytes(workspace.patch(job.patch))
            for path in job.collect:
                if workspace.execute_command(f"test -e {shlex.quote(path)}").exit_code == 0:
                    (folder / "files").mkdir(mode=0o700, exist_ok=True)
                    workspace.file_download(path, folder / "files" / Path(path).name)
            (folder / "server.log").write_text(workspace.logs())
        except (WorkspaceError, OSError) as error:
            self.fail("lost" if isinstance(error, WorkspaceError) else "agent", f"What it left was not kept: {error}")


def _call(agent: Agent, workspace: Workspace, task: dict[str, Any]) -> Any:
    result = agent(workspace, task)
    if inspect.isawaitable(result):
        return asyncio.run(_await(result))
    return result


async def _await(result: Any) -> Any:
    return await result
