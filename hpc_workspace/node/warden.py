"""The outer of a node program's two processes: waits for the inner one and clears up after it if it was killed.

Either of the two may be killed and the other still leaves nothing behind: the warden ends what the node program had,
and a node program whose warden dies gets a TERM from the kernel and ends itself. What is left when both are killed at
one blow goes with the end of the job, or with this user's next start on the node.

The warden is the process that Slurm signals and that the record names; it passes signals on and does nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import Any

from hpc_workspace import procfs, teardown
from hpc_workspace.errors import RendezvousError, WorkspaceError
from hpc_workspace.node import leftovers
from hpc_workspace.node.program import END_SIGNALS, NodeProgram, left_behind, make_record, node_name
from hpc_workspace.node.scratch import candidate_bases
from hpc_workspace.owner import Owner
from hpc_workspace.record import Failure, Record, Spec
from hpc_workspace.rendezvous import WorkspaceDirectory

log = logging.getLogger(__name__)


def main(path: Path) -> int:
    """Run the workspace in the directory `path`. Returns the exit code: 0 unless it failed."""
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    directory = WorkspaceDirectory(path.absolute())
    owner = Owner.of(os.getpid())
    try:
        program = NodeProgram(directory, owner)
    except WorkspaceError as error:
        log.error("%s", error)
        return 2
    teardown.become_subreaper()
    warden_pid = os.getpid()
    child = os.fork()
    if child == 0:
        teardown.end_with_parent(warden_pid, signal.SIGTERM)
        return program.run()
    passed_on: set[int] = set()
    for number in (*END_SIGNALS, signal.SIGUSR1):
        signal.signal(number, lambda number, _: _pass_on(child, number, passed_on))
    _, status = os.waitpid(child, 0)
    for number in (*END_SIGNALS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the child's id is free now, and what is left to do is the end
    code = os.waitstatus_to_exitcode(status)
    if _has_said_how_it_ended(directory, program.spec, owner):
        return code
    # Whether Slurm's signal was the end of the job, or of one of its lives, only Slurm knows.
    may_live_again = program.spec.may_restart and not passed_on.isdisjoint(END_SIGNALS)
    return _clear_up(directory, program.spec, owner, code, may_live_again=may_live_again)


def _pass_on(child: int, number: int, passed_on: set[int]) -> None:
    passed_on.add(number)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _has_said_how_it_ended(directory: WorkspaceDirectory, spec: Spec, owner: Owner) -> bool:
    try:
        record = directory.read_record()
    except (RendezvousError, OSError) as error:
        log.warning("the record can't be read: %s", error)
        return False
    return record is not None and record.launch_id == spec.launch_id and record.owner == str(owner) and record.is_final


def _clear_up(directory: WorkspaceDirectory, spec: Spec, owner: Owner, code: int, *, may_live_again: bool) -> int:
    """Do what the node program could not do any more: end everything, remove everything, say so in the record."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    log.error("the node program %s: clearing up after it", how)
    cleared = leftovers.clear(
        lambda found: found == owner,
        candidate_bases(os.environ),
        kin=lambda: procfs.descendants(os.getpid()),
    )
    failure = Failure(
        kind="ContainerError",
        what=f"The node program of workspace {spec.workspace_id} on {node_name()} {how}.",
        evidence=f"Its processes and its scratch were cleared away; see {directory.node_log}.",
    )
    if cleared.left:
        log.error("left behind: %s", ", ".join(cleared.left))
        failure = left_behind(cleared.left, failure)
    try:
        record = _final_record(directory, spec, owner, failure)
        directory.require_no_later_life(record)
        if not may_live_again:
            directory.forget_secrets()
        directory.publish(record)
    except (WorkspaceError, OSError) as error:
        log.error("the record can't be written: %s", error)
    return 1


def _final_record(directory: WorkspaceDirectory, spec: Spec, owner: Owner, failure: Failure) -> Record:
    """The record's last state: the node program's own, if it published one, with the failure."""
    end: dict[str, Any] = {"exit_reason": failure.what, "failure": failure}
    try:
        known = directory.read_record()
    except (RendezvousError, OSError):
        known = None
    if known is not None and known.owner == str(owner):
        return known.model_copy(update={"state": "failed", **end})
    return make_record(spec, owner, state="failed", **end)
