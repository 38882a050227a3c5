"""Fixtures for replicas."""

from pathlib import Path

import pytest

from glm4_deploy.pipeline import ExportOptions, export


@pytest.fixture(scope="session")
def other_cpu(tmp_path_factory):
    """The demo in int4: its answers differ from those of ``demo_cpu``."""
    folder = tmp_path_factory.mktemp("other") / "glm4-tiny"
    demo = Path(__file__).parents[3] / "demo" / "glm4-tiny"
    export(demo, folder, ExportOptions("cpu", "int4", max_batch_size=4, parity=False))
    return folder
