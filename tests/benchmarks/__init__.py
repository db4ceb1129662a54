"""Benchmarks: CPU time of one thread and peak memory, side by side in one process (`make bench`)."""
