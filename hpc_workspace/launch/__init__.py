"""How the node program gets to run: `local` as a child of this process, `slurm` in a batch job."""
