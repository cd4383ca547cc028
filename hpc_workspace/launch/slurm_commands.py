"""Slurm's command lines, as pairs of pure functions: build the argv, parse the answer.

Source: sbatch(1), squeue(1), sacct(1) and scancel(1) of Slurm 24.11. Not `--json`: its shapes changed in 23.02, 23.11
and 24.05.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_workspace.errors import SubmitError
from hpc_workspace.options import SlurmOptions

_SEPARATOR = "\x1f"
_SQUEUE_FORMAT = _SEPARATOR.join(("%i", "%T", "%N", "%r", "%S"))
_JOB_ID = re.compile(r"(\d+)(?:;\S+)?")

# squeue(1), JOB STATE CODES. What is in neither set (PENDING, RUNNING, SUSPENDED, COMPLETING, REQUEUED, or a word of a
# later Slurm) is not an end.
FINAL_STATES = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
WAITING_STATES = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"})

# What reaches the job of the submitter's environment, and nothing else: never the API keys in it.
EXPORTED = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "HPC_WORKSPACE_HOME",
    "HPC_WORKSPACE_CACHE",
    "PYTHONPATH",
)


@dataclass(frozen=True)
class JobStatus:
    """A job as Slurm sees it. `state` is Slurm's own word; `node` and `reason` may be empty."""

    job_id: str
    state: str
    node: str = ""
    reason: str = ""
    start: str = ""

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING_STATES


def build_sbatch_argv(
    options: SlurmOptions, *, name: str, directory: str, script: str, log: str, exported: list[str]
) -> list[str]:
    """The argv that submits `script`. Every option of the user's is on argv and none in the script's text.

    Args:
        log: its name in `directory`.
        name: the job's name, unique, so that it can be found after a submit that timed out.
        exported: names of variables that reach the job.
    """
    argv = [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        f"--chdir={directory}",
        # Relative to --chdir: in a path, Slurm would take % for a pattern and drop every backslash.
        f"--output={log}",
        "--open-mode=append",
        f"--export={','.join(exported) or 'NIL'}",
        "--nodes=1",
        "--ntasks=1",
        "--signal=B:USR1@120",
    ]
    if not options.requeue:
        argv.append("--no-requeue")
    return [*argv, *(_flag(option, value) for option, value in named_options(options).items()), script]


def named_options(options: SlurmOptions) -> dict[str, str | int | None]:
    """The options that sbatch gets, by its long names; None for a flag without a value."""
    own = {"extra", "setup", "template", "python"}
    # True is a flag, False is what sbatch does without it.
    given = options.model_dump(exclude=own).items()
    values = {name: value for name, value in given if value is not None and value is not False}
    named = {name: None if value is True else value for name, value in values.items()}
    return {name.lstrip("-").replace("_", "-"): value for name, value in {**named, **options.extra}.items()}


def _flag(option: str, value: str | int | None) -> str:
    return f"--{option}" if value is None else f"--{option}={value}"


def build_srun_argv(
    *,
    name: str,
    partition: str | None,
    cpus: int,
    exported: Sequence[str],
    slurm: SlurmOptions | None,
    command: Sequence[str],
    takes_stdin: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """The argv that runs `command` as a small job of its own on one node, and prints what it prints as it comes.

    Args:
        partition: None: Slurm's default.
        exported: names of variables that reach it.
        slurm: for what a job is charged to: account, QOS, reservation.
        takes_stdin: whether our stdin is the command's; else that is empty.
        more: other options of srun.

    Source: srun(1) of Slurm 24.11.
    """
    argv = [
        "srun",
        *([f"--partition={partition}"] if partition is not None else []),
        f"--job-name={name}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={cpus}",
        *([] if takes_stdin else ["--input=none"]),
        "--unbuffered",
        f"--export={','.join(exported) or 'NIL'}",
    ]
    for option in ("account", "qos", "reservation"):
        if slurm is not None and (value := getattr(slurm, option)) is not None:
            argv.append(f"--{option}={value}")
    return [*argv, *more, *command]


def parse_sbatch(stdout: str) -> str:
    """The new job's id, from `sbatch --parsable`: `id` or `id;cluster`, sometimes after lines of a site's own.

    Raises:
        SubmitError: there is none.
    """
    for line in reversed(stdout.splitlines()):
        if match := _JOB_ID.fullmatch(line.strip()):
            return match[1]
    raise SubmitError("sbatch gave no job id.", evidence=stdout.strip()[-1000:])


def build_find_argv(name: str) -> list[str]:
    """The argv that asks for the id of a job by its name."""
    return ["squeue", "--noheader", "--me", "--all", "--states=all", f"--name={name}", "--format=%i"]


def build_squeue_argv() -> list[str]:
    """The argv that asks for all of this user's jobs at once, those that ended a while ago too."""
    return ["squeue", "--noheader", "--me", "--all", "--states=all", "--array", f"--format={_SQUEUE_FORMAT}"]


def parse_squeue(stdout: str) -> dict[str, JobStatus]:
    """Each job by its id. A job that is not there has not necessarily ended: squeue forgets, and omits in silence."""
    found = {}
    for line in stdout.splitlines():
        fields = [field.strip() for field in line.split(_SEPARATOR)]
        if len(fields) == 5 and fields[0]:
            found[fields[0]] = JobStatus(*fields)
    return found


def build_sacct_argv(job_id: str) -> list[str]:
    return [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        f"--jobs={job_id}",
        "--format=JobID,State,NodeList,Reason",
    ]


def parse_sacct(stdout: str) -> JobStatus | None:
    """The last state that accounting knows; None if it knows nothing. `CANCELLED by 1000` is told as CANCELLED."""
    for line in reversed(stdout.splitlines()):
        fields = line.split("|")
        if len(fields) == 4 and fields[1]:
            word, _, by = fields[1].partition(" by ")
            return JobStatus(fields[0], word, "" if fields[2] == "None assigned" else fields[2], by or fields[3])
    return None


def build_config_argv() -> list[str]:
    """The argv that shows Slurm's configuration."""
    return ["scontrol", "show", "config"]


def parse_config(stdout: str) -> dict[str, str]:
    """Names and values of Slurm's configuration; what is not set, `(null)`, is left out."""
    pairs = (line.partition(" = ") for line in stdout.splitlines() if " = " in line)
    return {name.strip(): value.strip() for name, _, value in pairs if value.strip() != "(null)"}


def build_scancel_argv(*job_ids: str) -> list[str]:
    """The argv that cancels jobs; those that have ended are passed over."""
    return ["scancel", "--quiet", *job_ids]


def strip_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for Slurm's commands: without a surrounding job's variables, which would count as options."""
    kept_ones = {"SLURM_CONF", "SLURM_CLUSTERS"}
    return {
        name: value
        for name, value in environment.items()
        if name in kept_ones or not name.startswith(("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SCANCEL_"))
    }
