"""`hpc-workspace batch …`: an agent over many tasks, from a shell."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_workspace.cli.workspace_options import placement_options, pop_slurm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hpc_workspace.batch import Report
    from hpc_workspace.batch.run_dir import RunDir
    from hpc_workspace.batch.state import RunState

EXIT_INTERRUPTED = 130  # as shells say of SIGINT
_CLASSES_SHOWN = "agent, task_timeout; image, start, lost, oom, preempted, node_fail, time_limit, cancelled"


@click.group()
def batch() -> None:
    """Batches: an agent over many tasks, each attempt in a workspace of its own.

    What there is to know of a run is in its directory, on the shared file system: every command but `run` needs only
    that, from any login node.
    """


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)


_run_dir_argument = click.argument("run_dir", metavar="DIR", type=click.Path(path_type=Path))


@batch.command()
@click.argument("agent")
@click.argument("tasks", type=click.Path(path_type=Path))
@click.option("--run-dir", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Made if missing.")
@placement_options
@click.option("--pilots", type=int, default=1, show_default=True, help="How many jobs work on it at once.")
@click.option("--workspaces-per-pilot", type=int, default=1, show_default=True, help="Tasks at once in each of them.")
@click.option(
    "--retries", multiple=True, metavar="N | CLASS=N", help="Of the agent's own failures; or of a class. Repeatable."
)
@click.option("--retry", "retries_too", multiple=True, metavar="CLASS=N", help="As --retries.")
@click.option("--task-timeout", metavar="TIME", help="For one attempt with its workspace's start, such as 30min.")
@click.option("--memory-per-workspace", metavar="SIZE", help="All processes of one attempt together, such as 4G.")
@click.option(
    "--max-infra-loss",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="The share of tasks that may stay lost to the infrastructure.",
)
@click.option("--one-job-per-task", is_flag=True, help="A job for each task: Slurm's limits on each.")
@click.option("--no-smoke", is_flag=True, help="Don't have one task's sandbox start before the others are begun.")
@click.option("--patch", metavar="PATH", help="A repository in the workspace whose changes are kept.")
@click.option("--collect", multiple=True, metavar="PATH", help="A file of the workspace that is kept; repeatable.")
@_json_option
def run(agent: str, tasks: Path, run_dir: Path, as_json: bool, **values: Any) -> None:
    """Run AGENT (package.module:function) over TASKS, a JSONL file with an `id` on each line, and report.

    A task with an `image` of its own runs in that, others in --image. The same again goes on where an earlier call
    ended, and so does `resume`. The first Ctrl-C detaches: with --slurm the pilots go on; on this machine they end.

    Exits 0 if every task has its result and no more was lost to the infrastructure than --max-infra-loss; 1 if not;
    130 when detached; 255 if it can't be run.

    \b
    hpc-workspace batch run agents:solve tasks.jsonl --run-dir runs/a --slurm -p cpu -t 60 \\
        --image python.sif --pilots 8 --workspaces-per-pilot 4
    """
    from hpc_workspace.batch.run_dir import read_tasks

    slurm = pop_slurm(values)
    retries = (*values.pop("retries"), *values.pop("retries_too"))
    options = {name: value for name, value in values.items() if value not in (None, ())}
    options["smoke"] = not options.pop("no_smoke")
    invocation = {
        "agent": agent,
        "cwd": str(Path.cwd()),
        "import_path": [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))],
        "options": {**options, "retries": _parse_retries(retries)},
        "slurm": None if slurm is None else slurm.model_dump(mode="json", exclude_unset=True),
    }
    _coordinate(_RunDir(run_dir), list(read_tasks(tasks)), invocation, as_json=as_json)


@batch.command()
@_run_dir_argument
@_json_option
def resume(run_dir: Path, as_json: bool) -> None:
    """Go on with the run in DIR: pilots are put where they are missing. Nothing else need be said.

    What is done stays done; what was lost to the infrastructure for good gets another chance. Exit codes as of `run`.
    """
    found = _require_run(run_dir)
    _coordinate(found, list(found.tasks().values()), _require_invocation(found), as_json=as_json)


@batch.command()
@_run_dir_argument
@click.option("--class", "classes", multiple=True, metavar="CLASS", help=f"{_CLASSES_SHOWN}. Repeatable.")
@click.option("--task", "task_ids", multiple=True, metavar="ID", help="Only this task; repeatable.")
@_json_option
def retry(run_dir: Path, classes: tuple[str, ...], task_ids: tuple[str, ...], as_json: bool) -> None:
    """Give tasks that failed further attempts, by class, by id or both, and resume. Exit codes as of `run`.

    \b
    hpc-workspace batch retry runs/a --class agent --class task_timeout
    """
    from hpc_workspace.batch.state import RunReader

    found = _require_run(run_dir)
    invocation = _require_invocation(found)
    granted = choose_failed(RunReader(found).read(), classes, task_ids)
    found.grant(granted)
    click.echo(f"{len(granted)} task{'' if len(granted) == 1 else 's'} to be tried again", err=True)
    _coordinate(found, list(found.tasks().values()), invocation, as_json=as_json)


@batch.command()
@_run_dir_argument
@_json_option
def status(run_dir: Path, as_json: bool) -> None:
    """Say once how the run in DIR stands: counts, failures, pilots with what they wait for, slowest, latest tasks."""
    from hpc_workspace.batch.state import RunReader
    from hpc_workspace.cli.batch_overview import Looker

    found = _require_run(run_dir)
    overview = Looker(found).look(RunReader(found).read())
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(overview)))
        return
    from rich.console import Console

    from hpc_workspace.cli.batch_shown import make_table

    Console(highlight=False).print(make_table(_title(found), overview, pilots_max=len(overview.pilots)))


@batch.command()
@_run_dir_argument
def watch(run_dir: Path) -> None:
    """Show how the run in DIR goes until it is finished, or Ctrl-C. Only looks: `resume` has pilots submitted."""
    from hpc_workspace import clock
    from hpc_workspace.batch.state import RunReader
    from hpc_workspace.cli.batch_overview import Looker
    from hpc_workspace.cli.batch_shown import Shown

    found = _require_run(run_dir)
    reader, looker = RunReader(found), Looker(found)
    try:
        with Shown(_title(found)) as shown:
            for pause_s in clock.pauses_s(0.5, 3.0):
                state = reader.read()
                shown.show(looker.look(state))
                if state.is_complete:
                    break
                clock.sleep(pause_s)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


@batch.command()
@_run_dir_argument
@_json_option
def report(run_dir: Path, as_json: bool) -> None:
    """Derive results.jsonl, report.json and preds.jsonl of DIR anew, and print the counts. Exit codes as of `run`."""
    from hpc_workspace.batch import derive

    found = _require_run(run_dir)
    _finish(found, derive(found), as_json=as_json)


@batch.command()
@_run_dir_argument
@_json_option
def cancel(run_dir: Path, as_json: bool) -> None:
    """End all pilots of the run in DIR, running and queued, and whoever tops them up. `resume` goes on later.

    Exits 1 if a pilot may still work: one of another machine that is no job.
    """
    from hpc_workspace.batch.cancel import cancel as cancel_run
    from hpc_workspace.batch.state import RunReader

    found = _require_run(run_dir)
    done = cancel_run(found)
    state = RunReader(found).read()
    still_open = sum(not standing.is_final for standing in state.standings.values())
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(done), "open": still_open}))
    else:
        for job in done.jobs:
            click.echo(f"cancelled  {job}")
        for name in done.ended:
            click.echo(f"ended  {name}")
        for name, why in done.left.items():
            click.echo(f"LEFT  {name}: {why}")
        click.echo(f"{still_open} of {len(state.standings)} tasks stay open", err=True)
    sys.exit(1 if done.left else 0)


class _RunCancelled(Exception):
    """Somebody cancelled the run that is coordinated here."""


def _coordinate(run: RunDir, tasks: list[Mapping[str, Any]], invocation: dict[str, Any], *, as_json: bool) -> None:
    """Work on the run as its invocation says until it is finished, and exit."""
    from hpc_workspace.batch import evaluate
    from hpc_workspace.batch.cancel import cancellation
    from hpc_workspace.batch.state import RunReader
    from hpc_workspace.cli.batch_overview import Looker
    from hpc_workspace.cli.batch_shown import Shown

    slurm, options = _slurm_of(invocation), dict(invocation["options"])
    _enter(invocation)
    options["image"] = _image_of(tasks, options)
    looker = Looker(run, is_coordinated=True)
    before = cancellation(run)

    def on_state(state: RunState) -> None:
        shown.show(looker.look(state))
        if not state.is_complete and cancellation(run) != before:
            raise _RunCancelled

    try:
        with Shown(f"{run.path.name}  {invocation['agent']}") as shown:
            made = evaluate(
                invocation["agent"],
                tasks,
                run_dir=run.path,
                slurm=slurm,
                say=shown.say,
                on_state=on_state,
                invocation=invocation,
                **options,
            )
            shown.show(looker.look(RunReader(run).read()))
    except KeyboardInterrupt:
        _detach(run, is_local=slurm is None)
        sys.exit(EXIT_INTERRUPTED)
    except _RunCancelled:
        click.echo(f"The run was cancelled; `hpc-workspace batch resume {run.path}` goes on.", err=True)
        sys.exit(1)
    _finish(run, made, as_json=as_json)


def _detach(run: RunDir, *, is_local: bool) -> None:
    """Say how to come back; pilots that are processes of this machine end before."""
    from hpc_workspace.batch.cancel import end_local_pilots, slurm_jobs

    if not run.path.joinpath("run.json").exists():
        click.echo("Nothing was started.", err=True)
        return
    command = "hpc-workspace batch"
    if not is_local:
        count = len(slurm_jobs(run))
        go_on = f"{count} pilot{' goes' if count == 1 else 's go'} on"
        click.echo(f"Detached; {go_on}. Back: {command} watch {run.path} (looks), resume (tops up), cancel.", err=True)
        return
    click.echo("The pilots end ...", err=True)
    _, left = end_local_pilots(run)
    for name, why in left.items():
        click.echo(f"LEFT  {name}: {why}", err=True)
    click.echo(f"Stopped; to go on: {command} resume {run.path}", err=True)


def _enter(invocation: Mapping[str, Any]) -> None:
    """Be where the run was begun, with what could be imported there.

    Raises:
        ConfigError: that directory is gone.
    """
    from hpc_workspace.errors import ConfigError

    try:
        os.chdir(invocation["cwd"])
    except OSError as error:
        raise ConfigError(
            f"The directory {invocation['cwd']}, in which the run was begun, can't be entered.",
            option="run_dir",
            evidence=str(error),
            remedy="The agent is imported from there: put it back, or begin with `batch run` elsewhere.",
        ) from error
    sys.path[:0] = [path for path in invocation["import_path"] if path not in sys.path]


def _slurm_of(invocation: Mapping[str, Any]) -> Any:
    from hpc_workspace.options import SlurmOptions

    return None if invocation["slurm"] is None else SlurmOptions(**invocation["slurm"])


def _image_of(tasks: list[Mapping[str, Any]], options: dict[str, Any]) -> Any:
    """`--image`, or a function of the task where tasks have images of their own. Takes it out of `options`.

    Raises:
        ConfigError: some tasks have an image, others have none.
    """
    from hpc_workspace.errors import ConfigError

    common = options.pop("image", None)
    if options.get("runtime") == "process" or not any("image" in task for task in tasks):
        return common
    bare = [task.get("id") for task in tasks if not task.get("image", common)]
    if bare:
        raise ConfigError(
            f"{len(bare)} of {len(tasks)} tasks have no image.",
            option="image",
            evidence=f"The first of them is {bare[0]!r}.",
            remedy="Give --image for those.",
        )
    return lambda task: str(task.get("image", common))


def _parse_retries(given: tuple[str, ...]) -> dict[str, int]:
    """`2` and `CLASS=3` as what `evaluate` takes.

    Raises:
        ConfigError: one is neither.
    """
    from hpc_workspace.batch.outcomes import AGENT_CLASSES
    from hpc_workspace.errors import ConfigError

    retries: dict[str, int] = {}
    # A number is of the agent's own; a class by its name counts more, whichever comes first.
    for text in sorted(given, key=lambda one: "=" in one):
        name, _, count = text.rpartition("=")
        if not count.isdecimal():
            raise ConfigError(
                f"--retries {text!r} is neither a number nor CLASS=NUMBER.",
                option="retries",
                remedy=f"The classes are {_CLASSES_SHOWN}.",
            )
        retries |= dict.fromkeys([name] if name else AGENT_CLASSES, int(count))
    return retries


def choose_failed(state: RunState, classes: tuple[str, ...], task_ids: tuple[str, ...]) -> dict[str, int]:
    """The failed tasks of these classes (none: any) and ids (none: any), each with the number of its last attempt.

    Raises:
        ConfigError: neither is given, a class or a task is not known, a task that is named has not failed so, or there
            is none.
    """
    from hpc_workspace.batch.outcomes import FAILURE_CLASSES
    from hpc_workspace.errors import ConfigError

    if not classes and not task_ids:
        raise ConfigError("Nothing says which tasks.", option="class", remedy="Give --class, --task or both.")
    for name in classes:
        if name not in FAILURE_CLASSES:
            raise ConfigError(f"{name!r} is no failure class.", option="class", remedy=f"There are {_CLASSES_SHOWN}.")
    failed = {
        name: standing.attempt.number
        for name, standing in state.standings.items()
        if standing.state == "failed"
        and standing.attempt is not None
        and (not classes or standing.attempt.failure_class in classes)
    }
    for name in task_ids:
        if name not in failed:
            standing = state.standings.get(name)
            attempt = standing.attempt if standing is not None else None
            word = (attempt.failure_class if attempt is not None else None) or ""
            how = "not there" if standing is None else f"{standing.state} {word}".strip()
            raise ConfigError(
                f"Task {name!r} is not one that failed{' so' if classes else ''}.",
                option="task",
                evidence=f"It is {how}.",
                remedy="`hpc-workspace batch status DIR` says how the run stands.",
            )
    chosen = {name: number for name, number in failed.items() if not task_ids or name in task_ids}
    if not chosen:
        raise ConfigError(f"No task failed as {' or '.join(classes)}.", option="class")
    return chosen


def _finish(run: RunDir, made: Report, *, as_json: bool) -> None:
    """Print what it has come to, and exit."""
    if as_json:
        click.echo(json.dumps({**made.as_json(), "run_dir": str(run.path)}))
    else:
        total = len(made.results) + len(made.missing)
        counts = dict(sorted(made.counts.items(), key=lambda item: (item[0] != "done", item[0])))
        for name, count in counts.items():
            click.echo(f"{name:14} {count:6}")
        click.echo(f"{'missing':14} {len(made.missing):6}\n{'tasks':14} {total:6}")
        if made.attempts_lost:
            click.echo(
                f"{made.attempts_lost} of {sum(made.attempts.values())} attempts were lost to the infrastructure"
            )
        click.echo(f"{run.path}: results.jsonl, report.json, preds.jsonl")
    if not made.is_trustworthy:
        click.echo(f"hpc-workspace: the result can't be trusted: {why_not(made)}", err=True)
    sys.exit(0 if made.is_trustworthy else 1)


def why_not(made: Report) -> str:
    """Why a report is not to be trusted; empty if it is."""
    reasons = []
    if made.missing:
        more = " …" if len(made.missing) > 3 else ""
        reasons.append(f"{len(made.missing)} tasks have no result yet ({', '.join(made.missing[:3])}{more})")
    if made.infra_loss > made.max_infra_loss:
        reasons.append(
            f"{made.infra_losses} of {len(made.results)} tasks were lost to the infrastructure, "
            f"{made.infra_loss:.1%} where {made.max_infra_loss:.1%} may be"
        )
    return "; ".join(reasons)


def _title(run: RunDir) -> str:
    return f"{run.path.name}  {run.read_run().get('started_by', '')}"


def _RunDir(path: Path) -> RunDir:
    from hpc_workspace.batch.run_dir import RunDir

    return RunDir(path)


def _require_run(path: Path) -> RunDir:
    """Raises: ConfigError: there is none."""
    found = _RunDir(path)
    found.require()
    return found


def _require_invocation(run: RunDir) -> dict[str, Any]:
    """How `batch run` was called.

    Raises:
        ConfigError: it was not; somebody's own program called `evaluate`.
    """
    from hpc_workspace.errors import ConfigError

    invocation: dict[str, Any] | None = run.read_run().get("invocation")
    if invocation is None:
        raise ConfigError(
            f"The run in {run.path} was not begun from the command line.",
            option="run_dir",
            evidence=f"Its agent is {run.read_run().get('started_by', 'not known')}.",
            remedy="Run the program that called evaluate() again: that goes on as well.",
        )
    return invocation


__all__ = ["batch", "choose_failed", "why_not"]
