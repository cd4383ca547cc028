"""All checks, in the order in which they are shown."""

from __future__ import annotations

from hpc_workspace.doctor import here, runtime, slurm

MACHINE = (*here.CHECKS, *runtime.CHECKS)
SITE = slurm.CHECKS
