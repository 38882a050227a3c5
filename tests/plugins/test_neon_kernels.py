"""The kernels for aarch64, compiled by a cross compiler and run by an emulator: the bits of the portable ones."""

import shutil
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"{COMPILER} or {EMULATOR} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """kernels_agree.cpp with the sources and options of the package's own build."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [library] = build["tool"]["setuptools"]["ext-modules"]
    sources = [
        *(ROOT / source for source in library["sources"]),
        Path(__file__).with_name("kernels_agree.cpp"),
    ]
    folder = tmp_path_factory.mktemp("neon")
    common = [COMPILER, *library["extra-compile-args"], f"-I{ROOT / 'plugins/glm4_plugins/cpu'}"]
    commands = [[*common, "-c", source, "-o", folder / f"{source.name}.o"] for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(subprocess.run, check=True), commands))
    made = folder / "kernels_agree"
    subprocess.run([COMPILER, *folder.glob("*.o"), "-static", "-o", made], check=True)
    return made


@pytest.mark.parametrize(
    ("processor", "kernels"),
    [
        ("max", ["neon-i8mm", "neon-dotprod", "portable"]),
        ("neoverse-n1", ["neon-dotprod", "portable"]),  # without I8MM
        ("cortex-a57", ["portable"]),  # without dot products
    ],
)
def test_neon_kernels_have_the_bits_of_the_portable_ones(program, processor, kernels):
    run = subprocess.run([EMULATOR, "-cpu", processor, program, *kernels], capture_output=True, text=True)
    *supported, verdict = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout
    assert supported == kernels
    assert verdict == f"all agree; chosen: {kernels[0]}"
