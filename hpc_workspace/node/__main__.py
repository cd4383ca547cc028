"""`python -m hpc_workspace.node DIRECTORY`: run the workspace described in DIRECTORY to its end."""

import gc
import os
import sys
from pathlib import Path

# A tenth of the time until the container can be started goes into collecting what imports make, all of which stays.
gc.disable()

from hpc_workspace.node.warden import main  # noqa: E402

gc.freeze()
gc.enable()

if len(sys.argv) != 2:
    sys.exit("usage: python -m hpc_workspace.node DIRECTORY")
code = main(Path(sys.argv[1]))
sys.stdout.flush()
sys.stderr.flush()
# Everything is gone and said: taking the interpreter apart would only keep who waits for the end waiting.
os._exit(code)
