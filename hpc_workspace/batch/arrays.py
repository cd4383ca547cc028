"""Job arrays of pilots. The only module that uses submitit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_workspace import clock
from hpc_workspace.errors import JobEndedError, SchedulerUnavailableError
from hpc_workspace.launch.slurm import SlurmLaunched
from hpc_workspace.launch.slurm_commands import EXPORTED, named_options
from hpc_workspace.options import SlurmOptions
from hpc_workspace.rendezvous import WorkspaceDirectory

# submitit 1.5 configures logging when it is imported unless this is set before.
os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")


def run_array(pilot: Callable[[int], int], pilots: int, folder: Path, slurm: SlurmOptions | None) -> list[int]:
    """Run `pilot(0)` … `pilot(pilots - 1)` as one array and wait for all; what each returned.

    Raises:
        JobEndedError: a pilot ended without a result. Tasks that it had claimed have no record and run again next time.
    """
    import submitit

    executor: Any
    if slurm is None:
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=60 * 24 * 7)
    else:
        executor = submitit.SlurmExecutor(folder, python=slurm.python or sys.executable)
        executor.update_parameters(**_parameters(slurm, pilots))
    jobs = executor.map_array(pilot, list(range(pilots)))
    for job in jobs:
        _wait(job, folder, in_slurm=slurm is not None)
    try:
        return [job.result() for job in jobs]
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        raise _pilot_error(str(error)[-2000:]) from error


def _wait(job: Any, folder: Path, *, in_slurm: bool) -> None:
    """Wait until a pilot's result is there, or the pilot is gone.

    submitit knows a job's end from sacct alone, which many sites do not have: its result file and our own view of the
    queue are asked instead.
    """
    launched = SlurmLaunched(WorkspaceDirectory(folder), job.job_id, "") if in_slurm else None
    result = Path(job.paths.result_pickle)
    for pause_s in clock.pauses_s(0.1, 2.0):
        # Listed, and not looked up: NFS remembers for a minute that a file was not there.
        if result.name in os.listdir(result.parent):
            return
        if launched is None:
            if job.done():
                return
        elif (state := _end_of(launched)) and result.name not in os.listdir(result.parent):
            raise _pilot_error(f"Slurm job {job.job_id}: {state}. Its log: {job.paths.stderr}")
        clock.sleep(pause_s)


def _end_of(launched: SlurmLaunched) -> str:
    """The word for a job's end; empty while it has not ended, or while Slurm is silent."""
    try:
        status = launched.status()
    except SchedulerUnavailableError:
        return ""
    return status.state if status.is_final or status.state == "LOST" else ""


def _pilot_error(evidence: str) -> JobEndedError:
    return JobEndedError(
        "A pilot ended without a result.",
        evidence=evidence,
        remedy="Run the same call again: what has no record yet is done then.",
    )


def _parameters(slurm: SlurmOptions, pilots: int) -> dict[str, Any]:
    """`slurm` in submitit's words. What it has none for goes to sbatch under its own long name."""
    named = named_options(slurm)
    own = {"partition", "account", "qos", "time", "cpus_per_task", "mem", "mem_per_cpu", "gres", "constraint",
           "nodelist", "exclude", "comment"}  # fmt: skip
    exported = ",".join(name for name in EXPORTED if name in os.environ)
    # submitit writes a flag without a value for True.
    words = {name.replace("-", "_"): True if value is None else value for name, value in named.items()}
    others = {name.replace("_", "-"): value for name, value in words.items() if name not in own}
    return {
        **{name: value for name, value in words.items() if name in own},
        "setup": slurm.setup,
        "array_parallelism": pilots,
        "use_srun": False,
        "additional_parameters": {**others, "export": exported or "NIL"},
    }
