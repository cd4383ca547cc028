"""Interactive sessions: a program inside a workspace with its stdin, or a whole terminal, in somebody's hands.

    frames   what the two ends say to each other, as functions over bytes
    host     the end in the workspace: a program of its own, sent along as text, that needs Python 3.8 and nothing else
    start    brings the host into the workspace by an ordinary command, and a connection to it through the door
    session  this end

`frames` and `host` import nothing of ours but each other, for there is nothing of ours where they run.
"""

from __future__ import annotations

from hpc_workspace.interactive.session import Session
from hpc_workspace.interactive.start import open_session

__all__ = ["Session", "open_session"]
