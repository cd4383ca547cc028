"""`python -m hpc_workspace.node DIRECTORY`: run the workspace described in DIRECTORY to its end."""

import sys
from pathlib import Path

from hpc_workspace.node.warden import main

if len(sys.argv) != 2:
    sys.exit("usage: python -m hpc_workspace.node DIRECTORY")
sys.exit(main(Path(sys.argv[1])))
