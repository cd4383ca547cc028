"""The node program in a batch job: submit, know, cancel. The states are Slurm's own; unknown is never an end."""

from __future__ import annotations

import importlib.resources
import math
import os
import shlex
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_workspace import clock, processes
from hpc_workspace.errors import (
    ConfigError,
    JobEndedError,
    PrerequisiteError,
    SchedulerUnavailableError,
    SubmitError,
    WorkspaceError,
)
from hpc_workspace.launch import slurm_commands
from hpc_workspace.launch.reasons import explain_end, explain_pending
from hpc_workspace.launch.slurm_commands import JobStatus
from hpc_workspace.options import SlurmOptions
from hpc_workspace.rendezvous import WorkspaceDirectory

_TEMPLATE = "workspace.sbatch.j2"
_QUESTION_TIMEOUT_S = 45.0
_ASK_AGAIN_S = 2.0
# Many that end at once share an answer; an old one says of none that it is gone.
_ENDING_AGE_S = 0.3
# Accounting only adds to what squeue says, and asking it often has brought whole clusters to a stand.
_ASK_ACCOUNTING_AGAIN_S = 10.0
_ACCOUNTING_TIMEOUT_S = 5.0
# A question to a silent controller takes 18 s (squeue of Slurm 24.11) or until our time-out.
_SILENCE_S = 5.0
_LOST_AFTER_S = 90.0
# A job that was just submitted is not in an answer of a moment ago.
_MISSING_S = 5.0


def find_template(path: str | None) -> Path:
    """The batch script's template: the user's own, or ours, in the wheel or beside the package in a checkout.

    Raises:
        ConfigError: the user's own is not there.
    """
    if path is not None:
        try:
            own = Path(path).expanduser()
            is_file = own.is_file()
        except (OSError, RuntimeError) as error:  # a name that is too long, a home that is not known
            raise ConfigError(f"SlurmOptions: template {path}: {error}.", option="template") from error
        if not is_file:
            raise ConfigError(f"SlurmOptions: template {path} is not a file.", option="template")
        return own
    package = Path(str(importlib.resources.files("hpc_workspace")))
    for folder in (package / "slurm_templates", package.parent / "slurm_templates"):
        if (folder / _TEMPLATE).is_file():
            return folder / _TEMPLATE
    raise PrerequisiteError(f"{_TEMPLATE} is missing from the installation.", remedy="Install hpc-workspace anew.")


def render_batch_script(template: Path, *, options: SlurmOptions, directory: str) -> str:
    """The batch script. Values are quoted by the template's filter `quote`; a name it does not know is an error.

    Raises:
        ConfigError: the template is broken.
    """
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - shell, not HTML: the filter quotes
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quote"] = shlex.quote
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(
            python=options.python or sys.executable, directory=directory, setup=options.setup
        )
    except Exception as error:  # a template is a program: it can raise anything
        raise ConfigError(
            f"The batch script template {template} is broken.",
            option="template",
            evidence=f"{type(error).__name__}: {error}",
        ) from error


@dataclass(frozen=True)
class Submission:
    """What a job is submitted by: the batch script, and sbatch's argv with all of its options."""

    script: str
    argv: list[str]

    def __str__(self) -> str:
        return f"# {shlex.join(self.argv)}\n{self.script}"


def make_submission(directory: WorkspaceDirectory, options: SlurmOptions) -> Submission:
    """Render the script and build the argv; nothing is written or run.

    Raises:
        ConfigError: the template is broken.
        PrerequisiteError: ours is missing from the installation.
    """
    script = render_batch_script(find_template(options.template), options=options, directory=str(directory.path))
    argv = slurm_commands.build_sbatch_argv(
        options,
        name=job_name(directory),
        directory=str(directory.path),
        script=str(directory.batch_script),
        log=directory.node_log.name,
        exported=[name for name in slurm_commands.EXPORTED if name in os.environ],
    )
    return Submission(script, argv)


def submit(directory: WorkspaceDirectory, options: SlurmOptions) -> SlurmLaunched:
    """Write the batch script and submit it. A job that was queued although sbatch did not say so is found by its name.

    Raises:
        ConfigError: the template is broken.
        PrerequisiteError: there is no sbatch.
        SubmitError: sbatch refused; nothing is queued.
        SchedulerUnavailableError: Slurm did not answer, and nobody knows whether the job is queued.
    """
    submission = make_submission(directory, options)
    directory.write_batch_script(submission.script)
    python = options.python or sys.executable
    try:
        ended = _ask_slurm(submission.argv)
    except processes.ProgramTimeoutError as error:
        return SlurmLaunched(directory, _find_queued(job_name(directory), str(error)), python)
    if ended.returncode == 0:
        return SlurmLaunched(directory, slurm_commands.parse_sbatch(ended.stdout), python)
    if any(sign in ended.said for sign in _NOBODY_KNOWS):
        return SlurmLaunched(directory, _find_queued(job_name(directory), ended.said), python)
    raise SubmitError(
        "sbatch refused the job.",
        evidence=ended.said,
        remedy="`sinfo -s` lists the partitions; `sacctmgr show assoc user=$USER` your accounts.",
    )


# What Slurm's commands say when the controller was silent: it may have heard them all the same. Slurm 24.11, errno.c.
_NOBODY_KNOWS = (
    "Socket timed out",
    "Unable to contact slurm controller",
    "Zero Bytes were transmitted",
    "Message receive",
)


def _find_queued(name: str, said: str) -> str:
    """The id of the job called `name`, after an sbatch of which nobody knows whether it was heard.

    Raises:
        SubmitError: there is no such job.
        SchedulerUnavailableError: Slurm does not answer.
    """
    unknown = SchedulerUnavailableError(
        "Slurm does not answer: the job may or may not have been queued.",
        evidence=said,
        remedy=f"When it answers again, look for it: squeue --me --name={name}",
    )
    try:
        ended = _ask_slurm(slurm_commands.build_find_argv(name))
    except processes.ProgramTimeoutError:
        raise unknown from None
    if ended.returncode != 0:
        raise unknown
    if not (found := ended.stdout.split()):
        raise SubmitError("sbatch did not get through to Slurm: nothing is queued.", evidence=said)
    return found[0]


def _ask_slurm(argv: Sequence[str], timeout_s: float = _QUESTION_TIMEOUT_S) -> processes.Completed:
    return processes.run(argv, timeout_s=timeout_s, env=slurm_commands.strip_environment(os.environ))


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are passed over.

    Raises:
        SchedulerUnavailableError: Slurm does not answer; they may go on.
    """
    if not job_ids:
        return
    single = job_ids[0] if len(job_ids) == 1 else ""
    try:
        ended = _ask_slurm(slurm_commands.build_scancel_argv(*job_ids))
    except processes.ProgramTimeoutError as error:
        raise SchedulerUnavailableError(str(error), job_id=single) from error
    if ended.returncode != 0 and "Invalid job id" not in ended.said:
        what = single or f"of {len(job_ids)} jobs"
        raise SchedulerUnavailableError(f"scancel {what} failed.", job_id=single, evidence=ended.said)


def read_array_max() -> int | None:
    """How many tasks one array may have; None where Slurm does not say. slurm.conf(5), MaxArraySize."""
    try:
        ended = _ask_slurm(slurm_commands.build_config_argv())
    except processes.ProgramTimeoutError:
        return None
    said = slurm_commands.parse_config(ended.stdout).get("MaxArraySize", "") if ended.returncode == 0 else ""
    # The highest index is one below it, and ours begin at 0.
    return max(1, int(said) - 1) if said.isdigit() else None


def job_name(directory: WorkspaceDirectory) -> str:
    return f"hpcws-{directory.workspace_id}"


class JobView:
    """What Slurm knows about all jobs of this user, asked with one question and at most every few seconds."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know nothing. Also what a child does after a fork, in which the lock may be held for ever."""
        self._lock = threading.Lock()
        self._asked: clock.Deadline | None = None
        self._jobs: dict[str, JobStatus] = {}
        self._silence: tuple[clock.Deadline, SchedulerUnavailableError] | None = None
        self.accounting_is_off = False

    def status(
        self, job_id: str, *, max_age_s: float = _ASK_AGAIN_S, not_before_s: float = -math.inf
    ) -> JobStatus | None:
        """The job as of at most `max_age_s` ago and not before a moment of our clock; None if Slurm does not say.

        Raises:
            SchedulerUnavailableError: Slurm does not answer, which says nothing about the job.
        """
        return self._known(max_age_s, not_before_s).get(job_id)

    def ending_on(self, node: str, *, max_age_s: float) -> set[str]:
        """The ids of the jobs that are ending on `node`, and still have processes there as far as Slurm knows.

        Raises: as `status`.
        """
        jobs = self._known(max_age_s, -math.inf)
        return {job_id for job_id, status in jobs.items() if (status.state, status.node) == ("COMPLETING", node)}

    def _known(self, max_age_s: float, not_before_s: float) -> dict[str, JobStatus]:
        with self._lock:
            asked = self._asked
            if asked is None or asked.elapsed_s >= max_age_s or asked.started_s < not_before_s:
                self._ask_unless_silent()
            return self._jobs

    def _ask_unless_silent(self) -> None:
        """Ask anew; a controller that has just been silent is not asked again by each who wants to know of a job."""
        if self._silence is not None and not self._silence[0].is_over:
            raise SchedulerUnavailableError(self._silence[1].what, evidence=self._silence[1].evidence)
        asked = clock.Deadline(None)
        try:
            self._jobs = self._ask()
        except SchedulerUnavailableError as error:
            self._silence = (clock.Deadline(_SILENCE_S), error)
            raise
        self._asked, self._silence = asked, None

    def _ask(self) -> dict[str, JobStatus]:
        try:
            ended = _ask_slurm(slurm_commands.build_squeue_argv())
        except processes.ProgramTimeoutError as error:
            raise SchedulerUnavailableError(str(error)) from error
        if ended.returncode != 0:
            raise SchedulerUnavailableError("squeue failed.", evidence=ended.said)
        return slurm_commands.parse_squeue(ended.stdout)


view = JobView()
os.register_at_fork(after_in_child=view.forget)


class SlurmLaunched:
    """A node program in a job, submitted by this process or another; see `Launched`."""

    def __init__(self, directory: WorkspaceDirectory, job_id: str, python: str) -> None:
        self.job_id: str | None = job_id
        self._job = job_id
        self._directory = directory
        self._python = python
        self._last = JobStatus(job_id, "PENDING")
        self._accounting_asked: clock.Deadline | None = None
        self._was_ready = False
        self._noted_s = -math.inf
        self._missing: clock.Deadline | None = None

    def status(self, *, max_age_s: float = _ASK_AGAIN_S) -> JobStatus:
        """The job's last known status; LOST once nobody has known it for 90 s.

        Raises:
            SchedulerUnavailableError: Slurm does not answer.
        """
        if self._last.is_final:
            return self._last
        found = view.status(self._job, max_age_s=max_age_s, not_before_s=self._noted_s)
        if found is None:
            self._missing = self._missing or clock.Deadline(_LOST_AFTER_S)
            if self._missing.elapsed_s < _MISSING_S:
                return self._last
        if found is None or found.state == "CANCELLED":
            # squeue forgets a job, and never says by whom it was cancelled. Accounting that missed a job's end calls it
            # RUNNING for ever: that is no knowledge.
            told = self._ask_accounting()
            found = told if told is not None and told.is_final else found
        if found is not None:
            self._last, self._missing = found, None
            return found
        is_lost = self._missing is not None and self._missing.is_over
        return JobStatus(self._job, "LOST", self._last.node) if is_lost else self._last

    def _ask_accounting(self) -> JobStatus | None:
        if self._accounting_asked is not None and not self._accounting_asked.is_over:
            return None
        if view.accounting_is_off or processes.find_program("sacct") is None:
            return None
        self._accounting_asked = clock.Deadline(_ASK_ACCOUNTING_AGAIN_S)
        argv = slurm_commands.build_sacct_argv(self._job)
        try:
            ended = _ask_slurm(argv, timeout_s=_ACCOUNTING_TIMEOUT_S)
        except processes.ProgramTimeoutError:
            return None
        view.accounting_is_off = "accounting storage is disabled" in ended.said
        return slurm_commands.parse_sacct(ended.stdout) if ended.returncode == 0 else None

    def find_end(self) -> WorkspaceError | None:
        try:
            status = self.status()
        except SchedulerUnavailableError:
            return None
        if not status.is_final and status.state != "LOST":
            return None
        return job_ended_error(self._directory, status, self._python, was_ready=self._was_ready)

    def is_pending(self) -> bool:
        return self._last.is_waiting

    def note_ready(self, node: str) -> None:
        self._was_ready = True
        self._noted_s = clock.now_s()
        self._last, self._missing = JobStatus(self._job, "RUNNING", node), None

    def has_left(self, node: str) -> bool:
        """By the last answer that there was: `find_end` asks for a new one."""
        status = self._last
        return status.is_waiting or (status.state == "RUNNING" and status.node not in ("", node))

    def has_ending_neighbour(self, node: str) -> bool:
        try:
            return bool(view.ending_on(node, max_age_s=_ENDING_AGE_S) - {self._job})
        except SchedulerUnavailableError:
            return False

    def end(self) -> None:
        """Cancel the job, unless it is known to have ended.

        Raises:
            SchedulerUnavailableError: Slurm does not answer; the job may still run.
        """
        if self._last.is_final:
            return
        cancel_jobs([self._job])

    def wait_gone(self, timeout_s: float) -> bool:
        deadline = clock.Deadline(timeout_s)
        for pause_s in clock.pauses_s(0.05, 2.0):
            try:
                status = view.status(self._job, max_age_s=_ENDING_AGE_S)
            except SchedulerUnavailableError:
                status = self._last
            if status is None or status.is_final:
                return True
            if deadline.is_over:
                return False
            clock.sleep(min(pause_s, deadline.left_s))
        return False

    def describe(self) -> str:
        """The job in one line: Slurm's word, why it waits, when Slurm expects it to start."""
        status = self._last
        line = f"Slurm job {self._job}: {status.state}"
        if not status.is_waiting or status.reason in ("", "None"):
            return line
        reason = explain_pending(status.reason)
        line += f", {reason.text} ({status.reason})" if reason.text else f" ({status.reason})"
        if reason.never_resolves:
            return f"{line}. Waiting does not help: {reason.remedy}"
        return f"{line}; Slurm expects it to start at {status.start}" if status.start not in ("", "N/A") else line


def job_ended_error(
    directory: WorkspaceDirectory, status: JobStatus, python: str, *, was_ready: bool = False
) -> WorkspaceError:
    """Why a job ended under its workspace, or before it published an address, with the tail of its log."""
    tail = directory.log_tail(directory.node_log)
    if not was_ready and is_without_interpreter(tail, python):
        return PrerequisiteError(
            f"The interpreter {python} can't run hpc_workspace on node {status.node or '?'} (job {status.job_id}).",
            evidence=f"Last lines of {directory.node_log}:\n{tail}",
            remedy=NAME_INTERPRETER,
        )
    on = f" on {status.node}" if status.node else ""
    when = "under its workspace" if was_ready else "before the workspace was ready"
    return JobEndedError(
        f"Slurm job {status.job_id}{on} {explain_end(status.state, status.reason)} {when}.",
        job_id=status.job_id,
        state=status.state,
        node=status.node,
        evidence=f"Last lines of {directory.node_log}:\n{tail}" if tail else f"{directory.node_log} is empty.",
        remedy=_REMEDIES.get(status.state, "").format(node=status.node),
    )


NAME_INTERPRETER = 'Name one that the nodes have: SlurmOptions(python="/shared/venv/bin/python").'


def is_without_interpreter(tail: str, python: str) -> bool:
    """Whether a job's last words are that there is no `python` on its node, or one without this package."""
    return ("No module named" in tail and "hpc_workspace" in tail) or (
        python in tail and ("not found" in tail or "No such file" in tail)
    )


_REMEDIES = {
    "TIMEOUT": 'Ask for more time: SlurmOptions(time="02:00:00").',
    "OUT_OF_MEMORY": 'Ask for more memory: SlurmOptions(mem="8G").',
    "NODE_FAIL": 'Exclude the node: SlurmOptions(exclude="{node}").',
    "PREEMPTED": "Start another, or ask for a QOS or partition whose jobs are not preempted.",
    "LOST": "Slurm no longer knows the job: ask its administrators.",
}
