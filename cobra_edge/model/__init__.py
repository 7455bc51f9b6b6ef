"""The model in plain torch: the reference for everything else."""
