"""A workspace in a Slurm job: python examples/02_slurm.py IMAGE PARTITION"""

import sys

from hpc_workspace import ApptainerWorkspace, SlurmOptions

slurm = SlurmOptions(partition=sys.argv[2], time="00:05:00", mem="1G")
with ApptainerWorkspace(image=sys.argv[1], slurm=slurm) as workspace:
    print(workspace.node, workspace.execute_command("hostname").stdout.strip())
