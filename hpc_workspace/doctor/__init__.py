"""The doctor: looks at what this machine and a compute node really do, and says what to set.

`here` looks at the machine that it runs on, `runtime` at its container runtime, `slurm` at the scheduler, `reach` at
what is between this machine and a compute node. Each check is one function that tries the thing itself; `runner` keeps
a broken one from stopping the others. Nothing that is looked at is changed, and what is made to try it out is removed.
"""
