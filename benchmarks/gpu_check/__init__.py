"""Checks that need a GPU: kernels against float64, torch and the device's own ceilings; engines against eager.

    make gpu-check PYTHON=python3

Runs offline with what the host has (torch and Triton at least) and says what it refused. What tells most comes first,
and results go to ``benchmarks/results/gpu-check.json`` and ``.md`` after every case, from real runs only.
"""
