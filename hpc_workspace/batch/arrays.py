"""Job arrays of pilots. The only module that uses submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpc_workspace.errors import SubmitError
from hpc_workspace.launch.slurm_commands import EXPORTED, named_options
from hpc_workspace.options import SlurmOptions

# submitit 1.5 configures logging when it is imported unless this is set before.
os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
# A step inherits the job's own --export otherwise, which leaves it nothing. Source: srun(1), SLURM_EXPORT_ENV.
_SETUP = ["export SLURM_EXPORT_ENV=ALL"]
_JOB_NAME = "hpcws-batch"
_OWN = {"partition", "account", "qos", "time", "cpus_per_task", "mem", "mem_per_cpu", "gres", "constraint",
        "nodelist", "exclude", "comment"}  # fmt: skip


class Submitted:
    """One pilot's job."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self.job_id = local_name(job.job_id) if hasattr(job, "_process") else str(job.job_id)

    @property
    def has_ended(self) -> bool:
        """Of a process of this machine, whether it has; its end is reaped here. Of a job in Slurm, never."""
        return not hasattr(self._job, "_process") or self._job._process.poll() is not None

    def log_tail(self) -> str:
        """The last that it said on stderr."""
        try:
            return Path(self._job.paths.stderr).read_text(errors="replace").strip()[-2000:]
        except OSError:
            return ""


def local_name(submitit_id: str) -> str:
    """What stands for a job's id where there is none."""
    return f"local-{socket.gethostname().partition('.')[0]}-{submitit_id}"


def submit_pilots(pilot: Callable[[int], int], count: int, folder: Path, slurm: SlurmOptions | None) -> list[Submitted]:
    """Have `pilot(0)` … `pilot(count - 1)` run: as an array in Slurm, or each as a process of this machine.

    Raises:
        SubmitError: Slurm did not take it.
    """
    import submitit

    executor: Any
    if slurm is None:
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=60 * 24 * 7)
    else:
        executor = submitit.SlurmExecutor(folder, python=slurm.python or sys.executable)
        executor.update_parameters(**_parameters(slurm, count))
    try:
        with _deaf_to_the_terminal() if slurm is None else contextlib.nullcontext():
            return [Submitted(job) for job in executor.map_array(pilot, list(range(count)))]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SubmitError("Slurm did not take the pilots.", evidence=str(error)[-2000:]) from error


@contextlib.contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """What is begun here ignores SIGINT, until it says otherwise, as a pilot does.

    A terminal's Ctrl-C goes to all of its processes, and submitit's own would kill the pilots after a second.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's; whoever submits from another one is at no prompt
        return
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def _parameters(slurm: SlurmOptions, count: int) -> dict[str, Any]:
    """`slurm` in submitit's words. What it has none for goes to sbatch under its own long name."""
    exported = ",".join(name for name in EXPORTED if name in os.environ)
    # submitit writes a flag without a value for True.
    named = {name: True if value is None else value for name, value in named_options(slurm).items()}
    words = {name.replace("-", "_"): value for name, value in named.items()}
    others = {name.replace("_", "-"): value for name, value in words.items() if name not in _OWN}
    return {
        **{name: value for name, value in words.items() if name in _OWN},
        "job_name": _JOB_NAME,
        "setup": [*_SETUP, *slurm.setup],
        "array_parallelism": count,
        # A pilot that was preempted is replaced by another, at once; Slurm would have it wait for two minutes.
        "additional_parameters": {
            **({} if slurm.requeue else {"no-requeue": True}),
            **others,
            "export": exported or "NIL",
        },
    }
