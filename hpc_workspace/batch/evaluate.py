"""`evaluate`: prepare the run, have pilots work on it, derive the report."""

from __future__ import annotations

import importlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hpc_workspace import clock
from hpc_workspace.batch.attempt import Agent, Job
from hpc_workspace.batch.outcomes import INFRA_CLASSES, Policy
from hpc_workspace.batch.report import Report, derive
from hpc_workspace.batch.run_dir import RunDir, read_tasks
from hpc_workspace.batch.state import RunReader, RunState
from hpc_workspace.config import load_settings
from hpc_workspace.errors import ConfigError, ImageError
from hpc_workspace.options import SlurmOptions, WorkspaceOptions, parse_duration_s, parse_size_bytes
from hpc_workspace.request import prepare_image
from hpc_workspace.version import __version__

log = logging.getLogger(__name__)

ImageOf = Callable[[Mapping[str, Any]], str]
_FETCHES_AT_ONCE = 4


def evaluate(
    agent: Agent | str,
    tasks: Iterable[Mapping[str, Any]] | str | Path,
    *,
    run_dir: str | Path,
    image: str | ImageOf | None = None,
    slurm: SlurmOptions | None = None,
    pilots: int = 1,
    workspaces_per_pilot: int = 1,
    retries: int | Mapping[str, int] = 0,
    task_timeout: float | str | None = None,
    max_infra_loss: float = 0.05,
    memory_per_workspace: int | str | None = None,
    one_job_per_task: bool = False,
    smoke: bool = True,
    patch: str | None = None,
    collect: Iterable[str] = (),
    say: Callable[[str], None] = log.info,
    on_state: Callable[[RunState], None] = lambda state: None,
    invocation: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Run `agent(workspace, task)` over all tasks, each attempt in a new workspace, and report.

    The same call again goes on where an earlier one ended, however that ended: what is done stays done, and what was
    lost to the infrastructure is tried anew. Pilots of an earlier call that still work are left to it.

    Args:
        agent: a function, or where to import one (`package.module:function`); may be async. It returns what JSON can
            hold. An exception of its own is a failure of class `agent`.
        tasks: dicts with an `id` each, or a JSONL file of them.
        run_dir: made if missing; 0700. All that is known of the run is in it.
        image: as in `ApptainerWorkspace`, or a function of the task; left out only with `runtime="process"`.
        slurm: where the pilots run; None: on this machine.
        pilots: how many jobs of the array; one that ends too early is replaced.
        workspaces_per_pilot: how many tasks each works on at once.
        retries: of the agent's own failures; or by failure class. Losses to the infrastructure are retried anyhow.
        task_timeout: for one attempt with its workspace's start, in seconds or such as `"30min"`. A pilot whose job has
            less time left begins none.
        max_infra_loss: the share of tasks that may stay failed for reasons that are not the agent's; above, the
            report's `is_trustworthy` is False.
        memory_per_workspace: bytes, or such as `"4G"`: what all processes of an attempt may use together.
        one_job_per_task: a job for each task, for sites that want Slurm's limits on each.
        smoke: have one task's sandbox start before the others are begun.
        patch: a repository in the workspace whose changes are kept with each attempt.
        collect: files of the workspace that are kept with each attempt.
        say: told what happens, in words.
        on_state: given every state of the run that is seen on the way.
        invocation: what the caller wants to find in run.json, such as how to make this call again.
        options: further options of `ApptainerWorkspace`.

    Raises:
        ConfigError: an option or a task is wrong; nothing was started.
        ImageError: an image can't be had; they are fetched once, before any pilot starts.
        JobEndedError: pilots end before they do anything, or the first sandbox did not start.
        SubmitError, SchedulerUnavailableError: Slurm does not take the pilots.
    """
    from hpc_workspace.batch.coordinator import Coordinator, Wanted
    from hpc_workspace.batch.supervisor import Pilot

    settings = load_settings()
    chosen = settings.fill_in(options)
    slurm = settings.fill_in_slurm(slurm) if slurm is not None else None
    _require_counts(pilots=pilots, workspaces_per_pilot=workspaces_per_pilot)
    timeout_s = _checked("task_timeout", parse_duration_s, task_timeout)
    memory_bytes = _checked("memory_per_workspace", parse_size_bytes, memory_per_workspace)
    try:
        policy = Policy.of(retries)
    except ValueError as error:
        raise ConfigError("retries is not valid.", option="retries", evidence=str(error)) from error
    run = RunDir(Path(run_dir))
    named = list(read_tasks(tasks))
    images = _image_options(named, image, chosen)
    for one in {_frozen(found): found for found in images.values()}.values():
        WorkspaceOptions(**{**chosen, **one})
    run.prepare(named)
    run.write_run(
        {
            "version": __version__,
            "started_by": _name_of(agent),
            "started_at": clock.wall_s(),
            "policy": policy.model_dump(),
            "pilots": pilots,
            "workspaces_per_pilot": workspaces_per_pilot,
            "task_timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "max_infra_loss": max_infra_loss,
            "slurm": None if slurm is None else slurm.model_dump(exclude_none=True),
            "invocation": None if invocation is None else dict(invocation),
        }
    )
    reader = RunReader(run)
    state = reader.read()
    run.grant(lost_for_good(state))
    try:
        if not reader.read().is_complete:
            wanted = Wanted(pilots, slurm, _array_max(slurm), one_job_per_task)
            job = Job(load_agent(agent), chosen, _prepare_images(images, chosen, slurm, say), patch, tuple(collect))
            pilot = Pilot(
                job,
                run.path,
                1 if one_job_per_task else workspaces_per_pilot,
                str(Path.cwd()),
                tuple(map(str, sys.path)),
                timeout_s,
                memory_bytes,
                1 if one_job_per_task else None,
                is_careful=smoke and not state.attempts,
            )
            Coordinator(run, pilot, wanted, say=say, on_state=on_state).finish()
    finally:
        report = derive(run)
    return report


def lost_for_good(state: RunState) -> dict[str, int]:
    """Tasks that failed for reasons that are not the agent's, each with the number of its last attempt."""
    return {
        name: standing.attempt.number
        for name, standing in state.standings.items()
        if standing.state == "failed"
        and standing.attempt is not None
        and standing.attempt.failure_class in INFRA_CLASSES
    }


def load_agent(agent: Agent | str) -> Agent:
    """The function itself.

    Raises:
        ConfigError: it can't be imported.
    """
    if not isinstance(agent, str):
        return agent
    module, _, name = agent.partition(":")
    try:
        found = getattr(importlib.import_module(module), name or "agent")
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"The agent {agent} can't be imported.",
            option="agent",
            evidence=str(error),
            remedy="Name it as package.module:function; PYTHONPATH and the working directory count.",
        ) from error
    if not callable(found):
        raise ConfigError(f"The agent {agent} is not callable.", option="agent")
    loaded: Agent = found
    return loaded


def _name_of(agent: Agent | str) -> str:
    return agent if isinstance(agent, str) else f"{agent.__module__}:{getattr(agent, '__qualname__', agent)}"


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}; it must be at least 1.", option=name)


def _checked(option: str, parse: Callable[[Any], Any], value: Any) -> Any:
    if value is None:
        return None
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"{option} is not valid.", option=option, evidence=str(error)) from error


def _image_options(
    tasks: Iterable[Mapping[str, Any]], image: str | ImageOf | None, chosen: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """What says the image of each task, by its id."""
    names = ("image", "sif_file", "server_image")
    if image is None:
        own = {name: chosen[name] for name in names if chosen.get(name) is not None}
        return {str(task.get("id", "")): own for task in tasks}
    if callable(image):
        return {str(task.get("id", "")): {"image": image(task)} for task in tasks}
    return {str(task.get("id", "")): {"image": image} for task in tasks}


def _frozen(found: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(found.items()))


def _prepare_images(
    images: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[str, Any],
    slurm: SlurmOptions | None,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The options that say each task's image, as a path: every image is fetched once, now.

    Raises:
        ImageError: some can't be had; it names each with its reason.
    """
    wanted = Counter(_frozen(found) for found in images.values())
    say(f"{len(wanted)} image{'s' if len(wanted) > 1 else ''} for {len(images)} tasks")
    bare = {name: value for name, value in chosen.items() if name not in ("image", "sif_file", "server_image")}

    def prepare(key: tuple[tuple[str, Any], ...]) -> dict[str, Any] | ImageError:
        try:
            ready = prepare_image({**bare, **dict(key)}, slurm=slurm, say=say)
        except ImageError as error:
            return error
        return {name: value for name, value in ready.items() if name not in bare or bare[name] != value}

    with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
        ready = dict(zip(wanted, pool.map(prepare, wanted), strict=True))
    failed = {key: found for key, found in ready.items() if isinstance(found, ImageError)}
    if len(failed) == 1 and len(wanted) == 1:
        raise next(iter(failed.values()))
    if failed:
        lines = [f"{dict(key)}: {error.what} {error.evidence}"[:300] for key, error in failed.items()]
        raise ImageError(
            f"{len(failed)} of {len(wanted)} images can't be had.",
            evidence="\n".join(lines[:20]),
            remedy="`hpc-workspace images plan` says what is missing; nothing was started.",
        )
    found = {key: value for key, value in ready.items() if not isinstance(value, ImageError)}
    return {task_id: found[_frozen(one)] for task_id, one in images.items()}


def _array_max(slurm: SlurmOptions | None) -> int | None:
    if slurm is None:
        return None
    from hpc_workspace.launch.slurm import read_array_max

    return read_array_max()


__all__ = ["Report", "evaluate", "load_agent", "lost_for_good"]
