"""Benchmarks of what models write, and the sandbox in which it runs."""
