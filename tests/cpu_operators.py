"""Tests of target cpu run wherever its operators could be built: only without a compiler are they skipped."""

import shutil

import pytest

from glm4_plugins.block_product import library, supported_kernels

CAN_BE_BUILT = library() is not None or any(map(shutil.which, ("c++", "g++", "clang++")))
needs_cpu_operators = pytest.mark.skipif(not CAN_BE_BUILT, reason="no C++ compiler built the CPU operators")
CPU_TARGET = pytest.param("cpu", marks=needs_cpu_operators)
KERNELS = supported_kernels() or ("portable",)  # those that this processor supports
