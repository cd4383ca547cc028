"""`python -m hpc_workspace.server`."""

import sys

from hpc_workspace.server.launch import main

sys.exit(main(sys.argv[1:]))
