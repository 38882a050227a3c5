"""Long contexts: YaRN helps behind the trained positions, and a KV cache in fewer bits loses nowhere."""

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval")

from benchmarks.eval_positions import measured

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def perplexities(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("long"))["perplexity_by_position"]


def test_yarn_helps_behind_the_trained_positions(perplexities):
    """Measured 2k-4k: 39.57 without YaRN, 36.89 with YaRN; before 2k YaRN costs at most 0.8 %."""
    for bucket, found in perplexities.items():
        ratio = found["yarn-f32"] / found["plain-f32"]
        assert ratio < 0.96 if bucket.endswith("_2k-4k") else 1 <= ratio < 1.02


@pytest.mark.parametrize("cache", ["f16", "kv8"])
def test_a_smaller_cache_loses_nothing_at_any_position(perplexities, cache):
    for found in perplexities.values():
        for name in ("plain", "yarn"):
            assert found[f"{name}-{cache}"] / found[f"{name}-f32"] == pytest.approx(1, abs=2e-3)
