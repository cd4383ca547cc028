"""`python -m hpc_workspace.cli`: the command, where only the interpreter is known."""

from hpc_workspace.cli import main

main()
