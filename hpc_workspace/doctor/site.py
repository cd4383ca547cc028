"""What the checks of one machine share: where state and images are, the settings, answers that are asked for once."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

from hpc_workspace import processes
from hpc_workspace.config import Settings, load_settings
from hpc_workspace.doctor.finding import Level
from hpc_workspace.errors import ConfigError
from hpc_workspace.rendezvous import state_dir

_Answer = TypeVar("_Answer")


class Site:
    """This machine, as the checks see it. Safe to use from several threads.

    Args:
        is_node: whether it is the compute node of `doctor --node`.
        has_store: whether the image store is there where the doctor was asked; False: nothing is known.
        lacks_network: whether no registry can be reached from there.

    Attributes:
        settings: those that hold; what is built in where they are broken, which is a finding of its own.
        settings_error: why they are broken; None: they are not.
        in_job: whether this process is part of a Slurm job.
        runs_containers: whether workspaces run on this machine; False on a login node.
    """

    def __init__(self, *, is_node: bool = False, has_store: bool = False, lacks_network: bool = False) -> None:
        self.is_node = is_node
        self.has_store = has_store
        self.lacks_network = lacks_network
        self.settings_error: ConfigError | None = None
        try:
            self.settings = load_settings()
        except ConfigError as error:
            self.settings, self.settings_error = Settings(), error
        self.in_job = "SLURM_JOB_ID" in os.environ
        self.has_slurm = any(processes.find_program(name) for name in ("sbatch", "srun", "squeue"))
        self.runs_containers = self.in_job or not self.has_slurm
        self._lock = threading.Lock()
        self._answers: dict[str, Future[Any]] = {}

    @property
    def state(self) -> Path:
        """The state directory. Raises: ConfigError: there can be none."""
        return state_dir()

    @property
    def store(self) -> Path:
        """The image store, by the settings that hold."""
        return Path(self.settings.workspace.cache_dir or "~/.apptainer_cache").expanduser().absolute()

    def serious(self, level: Level = "fail") -> Level:
        """`level`, for what workspaces need where they run; a warning on a login node, where none do."""
        return level if self.runs_containers else "warn"

    def once(self, name: str, ask: Callable[[], _Answer]) -> _Answer:
        """The answer to a question that several checks have: asked by the first, waited for by the others.

        Raises: what `ask` raised, to each of them.
        """
        with self._lock:
            is_first = name not in self._answers
            answer = self._answers.setdefault(name, Future())
        if is_first:
            try:
                answer.set_result(ask())
            except BaseException as error:
                answer.set_exception(error)
                raise
        return cast("_Answer", answer.result())

    @contextlib.contextmanager
    def probe_dir(self, place: Path) -> Iterator[Path]:
        """A new 0700 directory in `place`, or in the nearest directory above it that is there; removed at the end.

        Raises:
            OSError: it can't be made.
        """
        with tempfile.TemporaryDirectory(
            prefix=".hpcws-doctor-", dir=nearest(place), ignore_cleanup_errors=True
        ) as made:
            yield Path(made)


def nearest(place: Path) -> Path:
    """`place` if it is there, else the nearest directory above it that is."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
