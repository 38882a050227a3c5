"""Room on disks: the estimate holds the files, and what does not fit is refused before the work."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import CPU_TARGET

from glm4_deploy import pipeline, room
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.plan import make_plan
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine.options import EngineOptions
from glm4_runtime.bundle import WEIGHTS, read_manifest
from glm4_runtime.errors import ExportError

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
GIB = 2**30
OPTIONS = {
    "int8": ExportOptions(), "int4": ExportOptions(precision="int4"), "cpu": ExportOptions(target="cpu"),
}  # fmt: skip


def plan_of(checkpoint, options):
    with Checkpoint.load(checkpoint) as source:
        return make_plan(source, options)


def engine(**options):
    return ExportOptions(target="tensorrt-rtx", precision="fp16", engine=EngineOptions(**options))


@pytest.mark.parametrize("name", ["int8", "int4", CPU_TARGET])
def test_the_estimate_holds_the_data_file_and_little_more(demo_quantized, name):
    stored = read_manifest(demo_quantized[name]).files[WEIGHTS].bytes
    said = room.weight_file(plan_of(DEMO, OPTIONS[name]))
    assert stored <= said <= 1.25 * stored  # of tensors this small, much is the end of a page


def test_an_engine_needs_the_weights_and_each_engine_file(tmp_path):
    """As measured with the 9B: the engine takes 1.005 times what its weights take, beside which it is written."""
    weights = room.weight_file(plan_of(DEMO, engine()))
    for options, files in ((engine(), 1), (engine(layout="split"), 2), (engine(keep_onnx=True), 1)):
        (path, size), *others = room._written(plan_of(DEMO, options), tmp_path / "bundle")
        assert (path, others) == (tmp_path, [])
        assert size == round((1 + 1.02 * files) * weights)


def test_the_measured_engines_fit_the_estimate():
    """benchmarks/results/engine-9b-*.json: bytes of the 9B's engines."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "head_dim": 128,
             "intermediate_size": 13696, "vocab_size": 151552}  # fmt: skip
    from glm4_exporters.architecture import expected_tensors
    from glm4_exporters.config import Glm4Config
    from glm4_exporters.form import choose_form

    config = Glm4Config.from_dict(tiny_config(**sizes))
    for precision, engine_bytes in (("int8", 10_072_750_932), ("int4", 6_500_229_772)):
        form = choose_form(config, "causal-lm", "tensorrt-rtx", precision)
        share = engine_bytes / form.weight_bytes(expected_tensors(config, "causal-lm"))
        assert 1 < share < room.ENGINE_SHARE


@pytest.fixture
def disks(monkeypatch):
    """A function that gives folders so many free bytes."""

    def free(**folders):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda folder: SimpleNamespace(free=folders[Path(folder).name])
        )

    return free


def test_an_engine_that_does_not_fit_is_refused_before_the_work(tmp_path, monkeypatch, disks):
    plan = plan_of(DEMO, engine())
    ((_, needed),) = room._written(plan, tmp_path / "bundle")
    monkeypatch.setattr(pipeline, "_prepare", lambda *_: pytest.fail("work was done"))
    monkeypatch.setattr(pipeline, "_trace", lambda *_: pytest.fail("work was done"))
    disks(**{tmp_path.name: needed - 1})
    with pytest.raises(ExportError, match=r"writes 0\.0 GB below .*, which has 0\.0 GB free; make room"):
        export(DEMO, tmp_path / "new" / "bundle", engine())
    assert list(tmp_path.iterdir()) == []
    disks(**{tmp_path.name: needed})
    room.require_room(plan, tmp_path / "new" / "bundle")


def timed(tmp_path, cache):
    return SimpleNamespace(timing_cache=str(cache), layout="shared", attention="native", keep_onnx=False)


def test_a_timing_cache_counts_where_it_is_written(tmp_path, monkeypatch, disks):
    plan = plan_of(DEMO, engine())
    ((_, bundle),) = room._written(plan, tmp_path / "bundle")
    cache = tmp_path / "timings"
    plan = SimpleNamespace(**{**vars(plan), "engine": timed(tmp_path, cache)})
    disks(**{tmp_path.name: bundle + room.TIMING_CACHE - 1})
    with pytest.raises(ExportError, match="make room"):
        room.require_room(plan, tmp_path / "bundle")
    disks(**{tmp_path.name: bundle + room.TIMING_CACHE})
    room.require_room(plan, tmp_path / "bundle")
    with cache.open("wb") as file:
        file.truncate(2 * room.TIMING_CACHE)  # the new one lies beside the old one for a moment
    with pytest.raises(ExportError, match="make room"):
        room.require_room(plan, tmp_path / "bundle")


def test_each_disk_is_asked_for_its_own_part(tmp_path, monkeypatch, disks):
    (tmp_path / "bundles").mkdir()
    (tmp_path / "caches").mkdir()
    plan = plan_of(DEMO, engine())
    plan = SimpleNamespace(**{**vars(plan), "engine": timed(tmp_path, tmp_path / "caches" / "timings")})
    (_, bundle), _ = room._written(plan, tmp_path / "bundles" / "one")
    real = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda p, **k: SimpleNamespace(st_dev=p.name, st_mode=real(p, **k).st_mode)
    )
    disks(bundles=bundle, caches=room.TIMING_CACHE)
    room.require_room(plan, tmp_path / "bundles" / "one")
    disks(bundles=bundle, caches=room.TIMING_CACHE - 1)
    with pytest.raises(ExportError, match=r"writes 0\.1 GB below .*caches"):
        room.require_room(plan, tmp_path / "bundles" / "one")


def test_a_full_disk_is_refused_for_every_target(tmp_path, disks):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_config())
    disks(**{tmp_path.name: 10_000})
    with pytest.raises(ExportError, match="make room"):
        export(checkpoint, tmp_path / "bundle", ExportOptions(precision="fp32", parity=False))
