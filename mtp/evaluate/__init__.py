"""Evaluation: programs that a model wrote are run here, and nowhere else."""
