"""The parts of `benchmarks/gpu_check.py`, each a program of its own: `python -m gpu A ...`."""
