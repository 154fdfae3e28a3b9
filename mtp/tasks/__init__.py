"""Synthetic tasks: problems from a seed, answers judged from the question alone. See `table`."""
