"""Parameters and forward passes, nothing else."""
