"""The parts of `benchmarks/gpu_check.py`, each a separate program: `python -m gpu A ...`."""
