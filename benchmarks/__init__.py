"""Timings and memory of noetherflow; `python -m benchmarks [name ...]`."""
