"""`python -m hpc_workspace.node.reap`: find and remove what this user's dead workspaces left on this node.

Prints what it did as one JSON object, and exits 1 if something could not be removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys

from hpc_workspace import rendezvous
from hpc_workspace.errors import RendezvousError
from hpc_workspace.node import leftovers
from hpc_workspace.node.leftovers import Cleared
from hpc_workspace.node.scratch import candidate_bases
from hpc_workspace.owner import Owner
from hpc_workspace.record import Failure, Record
from hpc_workspace.rendezvous import WorkspaceDirectory

log = logging.getLogger(__name__)


def reap_this_node() -> Cleared:
    """Clear away what dead workspaces left here, and say in their records that they are dead."""
    cleared = leftovers.clear(leftovers.is_stale, candidate_bases(os.environ))
    for directory in rendezvous.list_workspaces():
        with contextlib.suppress(RendezvousError, OSError):
            record = directory.read_record()
            owner = Owner.parse(record.owner) if record is not None else None
            if record is None or owner is None or record.is_final or record.may_restart:
                continue  # one that Slurm may requeue still needs its key
            if owner.fate() == "dead":
                _bury(directory, record)
                cleared.removed.append(f"the key of {record.workspace_id}, which died unseen")
    return cleared


def _bury(directory: WorkspaceDirectory, record: Record) -> None:
    """Write the end that nobody was left to write. The logs stay, as the evidence."""
    what = f"The node program of workspace {record.workspace_id} on {record.node} died without a word."
    failure = Failure(kind="ContainerError", what=what, evidence=f"See {directory.node_log}.")
    directory.forget_secrets()
    directory.publish(record.model_copy(update={"state": "failed", "exit_reason": what, "failure": failure}))


def main() -> int:
    """Reap, and print what was done. Returns 1 if something is left."""
    cleared = reap_this_node()
    print(json.dumps(dataclasses.asdict(cleared)))
    return 1 if cleared.left else 0


if __name__ == "__main__":
    sys.exit(main())
