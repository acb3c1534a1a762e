"""How work is started: one training process, a SLURM job; and what this machine can do."""
