"""Checkpoints of random weights that a test may damage."""

import pytest
from checkpoints import tiny_config, write_checkpoint


@pytest.fixture
def tiny(tmp_path):
    return write_checkpoint(tmp_path / "tiny", tiny_config())


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "sharded", tiny_config(), shards=3)
