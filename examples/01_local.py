"""A workspace on this machine: python examples/01_local.py IMAGE"""

import sys

from hpc_workspace import ApptainerWorkspace

with ApptainerWorkspace(image=sys.argv[1]) as workspace:
    print(workspace.execute_command("python3 -V").stdout.strip())
