"""Job arrays of pilots. The only module that uses submitit."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_workspace.errors import JobEndedError
from hpc_workspace.launch.slurm_commands import EXPORTED
from hpc_workspace.options import SlurmOptions

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
    try:
        return [job.result() for job in jobs]
    except submitit.core.utils.UncompletedJobError as error:
        raise JobEndedError(
            "A pilot ended without a result.",
            evidence=str(error)[-2000:],
            remedy="Run the same call again: what has no record yet is done then.",
        ) from error


def _parameters(slurm: SlurmOptions, pilots: int) -> dict[str, Any]:
    """`slurm` in submitit's words. What it has none for goes to sbatch under its own long name."""
    named = slurm.model_dump(exclude={"extra", "setup", "template", "python"}, exclude_none=True)
    own = {"partition", "account", "qos", "time", "cpus_per_task", "mem", "mem_per_cpu", "gres", "constraint",
           "nodelist", "exclude", "comment"}  # fmt: skip
    exported = ",".join(name for name in EXPORTED if name in os.environ)
    others = {name.replace("_", "-"): value for name, value in named.items() if name not in own}
    return {
        **{name: value for name, value in named.items() if name in own},
        "setup": slurm.setup,
        "array_parallelism": pilots,
        "use_srun": False,
        "additional_parameters": {**others, **slurm.extra, "export": exported or "NIL"},
    }
