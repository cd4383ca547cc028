"""`python -m hpc_workspace.doctor`: the half of `hpc-workspace doctor --node` that runs on the node."""

from hpc_workspace.doctor.node_side import main

main()
