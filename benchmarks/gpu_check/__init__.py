"""Checks that need a GPU: kernels against float64, torch and the device's own ceilings; engines against eager.

    make gpu-check PYTHON=python3

Runs offline with what the host has (torch and Triton at least) and says what it refused. Results go to
``benchmarks/results/gpu-check.json`` and ``.md``, from real runs only.
"""
