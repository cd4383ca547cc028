"""The doctor's other half, on a compute node: answers what it is asked, a line of JSON each, as long as it is.

A line that begins with `MARK` is an answer; whatever else a site's start-up files print there is passed over. The first
says who answers. When stdin ends, what was started is ended, and so is this.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_workspace import clock, files
from hpc_workspace.doctor.checks import MACHINE
from hpc_workspace.doctor.here import try_lock
from hpc_workspace.doctor.runner import run_checks
from hpc_workspace.doctor.site import Site
from hpc_workspace.errors import WorkspaceError
from hpc_workspace.node.program import node_name
from hpc_workspace.version import __version__

MARK = "HPCWS-DOCTOR "


def wait_for_text(folder: Path, name: str, text: str, timeout_s: float) -> float | None:
    """Seconds until the file `name` in `folder` holds `text`; None: not within `timeout_s`.

    The directory is listed before each look: NFS remembers for a while that a file was not there.
    """
    deadline = clock.Deadline(timeout_s)
    for pause_s in clock.pauses_s(0.005, 0.5):
        try:
            if name in os.listdir(folder) and (folder / name).read_text() == text:
                return deadline.elapsed_s
        except OSError:
            pass  # not there, or not yet: the next look tells
        if deadline.is_over:
            return None
        clock.sleep(min(pause_s, deadline.left_s))
    raise AssertionError("pauses never end")


class NodeSide:
    """What the node's side can be asked; each method is a question, its keywords the question's fields."""

    def __init__(self) -> None:
        self._workspace: Any = None

    def clock(self) -> dict[str, Any]:
        """This node's clock."""
        return {"wall_s": clock.wall_s()}

    def see(self, *, folder: str, known: list[str], text: str, timeout_s: float) -> dict[str, Any]:
        """How long until a file written where the question is from is seen here; and another one written for there.

        Args:
            known: what lay beside `folder` long before it was made: where none of it is seen, nothing is waited for.
        """
        place = Path(folder)
        try:
            is_other = bool(known) and not set(known) & set(os.listdir(place.parent))
        except OSError as error:
            return {"seen_s": None, "why": f"does not see it ({error.strerror})"}
        if is_other:
            return {"seen_s": None, "why": "has another directory there"}
        seen_s = wait_for_text(place, "from-here", text, timeout_s)
        if seen_s is None:
            return {"seen_s": None, "why": "sees the directory, but no new file in it"}
        files.write_whole(place / "from-node", text[::-1].encode())
        return {"seen_s": seen_s, "uid": place.stat().st_uid}

    def lock(self, *, path: str) -> dict[str, Any]:
        """What a process of this node gets that wants a lock which is held where the question is from."""
        try:
            return {"lock": try_lock(Path(path))}
        except OSError as error:
            return {"lock": str(error)}

    def check(self, *, has_store: bool, lacks_network: bool) -> dict[str, Any]:
        """The findings of all checks of a machine."""
        site = Site(is_node=True, has_store=has_store, lacks_network=lacks_network)
        found = run_checks(MACHINE, site, node=node_name())
        return {"findings": [dataclasses.asdict(finding) for finding in found]}

    def workspace(self) -> dict[str, Any]:
        """The id of a workspace that is started here, without a container, and ended with this process."""
        from hpc_workspace.workspace import ApptainerWorkspace

        self._workspace = ApptainerWorkspace(runtime="process", detach_logs=False)
        return {"id": self._workspace.start().id}

    def close(self) -> None:
        """End what was started."""
        if self._workspace is not None:
            self._workspace.close()


def main() -> None:
    """Answer the questions on stdin."""
    logging.getLogger("hpc_workspace").setLevel(logging.ERROR)  # its workspace has no container, on purpose
    _tell(
        node=node_name(),
        version=__version__,
        uid=os.getuid(),
        job_id=os.environ.get("SLURM_JOB_ID", ""),
        partition=os.environ.get("SLURM_JOB_PARTITION", ""),
    )
    side = NodeSide()
    questions: dict[str, Callable[..., dict[str, Any]]] = {
        "clock": side.clock,
        "see": side.see,
        "lock": side.lock,
        "check": side.check,
        "workspace": side.workspace,
    }
    try:
        for line in sys.stdin:
            question = json.loads(line)
            try:
                _tell(**questions[question.pop("question")](**question))
            except (WorkspaceError, OSError) as error:
                _tell(error=str(error))
    finally:
        side.close()


def _tell(**values: Any) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps(values)}\n")
    sys.stdout.flush()
