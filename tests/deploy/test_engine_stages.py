"""Exports to several engines, one for each stage: what is built, what the manifest says of it, what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from benchmarks import engine_stages
from glm4_deploy import engine_bundle
from glm4_deploy.bench import _weight_bytes
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.plan import make_plan
from glm4_deploy.room import _written
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine.options import EngineOptions
from glm4_runtime import BundleError, ExportError, Session
from glm4_runtime.bundle import read_manifest, verify_files

pytest.importorskip("tensorrt_rtx")

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
TARGET, STAGES = "tensorrt-rtx", (1, 3)


def options(precision="fp16", parity=False, stages=STAGES, **engine):
    return ExportOptions(
        TARGET,
        precision,
        max_seq_len=1000,
        max_batch_size=4,
        parity=parity,
        stages=stages,
        engine=EngineOptions(**engine),
    )


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """fp16, with its ONNX kept and its parity proved, and the steps that the export reported."""
    folder, steps = tmp_path_factory.mktemp("staged") / "bundle", []
    result = export(DEMO, folder, options(keep_onnx=True, parity=True), progress=lambda *s: steps.append(s))
    return folder, result, steps


def test_the_manifest_lists_the_engine_of_each_stage(staged):
    folder, _, _ = staged
    manifest = read_manifest(folder)
    verify_files(folder, manifest, hashes=True)
    assert [(s.first_layer, s.layers, s.data_files) for s in manifest.stages] == [
        (0, 1, ("stage-1.engine",)),
        (1, 3, ("stage-2.engine",)),
    ]
    for stage in manifest.stages:
        assert [(p.name, p.index) for p in stage.profiles] == [("prefill", 0), ("decode", 1)]
        assert stage.profiles[0].axes["sequence"] == (1, 512, 512)
    assert manifest.engine.profiles == ()
    assert manifest.engine.layers["KV_CACHE_UPDATE"] == manifest.engine.layers["ROTARY_EMBEDDING"] == 8
    assert manifest.engine.layers["MATRIX_MULTIPLY"] == 4 * 7 + 1
    assert manifest.engine.float32 == {"Cast": 1, "RMSNormalization": 17}
    assert set(manifest.engine.built_from) == {
        f"stage-{number}.onnx{data}" for number in (1, 2) for data in ("", ".data")
    }
    assert {spec.shape for spec in manifest.inputs if "key_values" in spec.name} == {("batch", 2, 1024, 64)}
    assert _weight_bytes(manifest) == sum((folder / f"stage-{n}.engine").stat().st_size for n in (1, 2))


def test_each_engine_holds_its_own_layers_and_weights(staged):
    """Without a GPU no engine can be deserialized; its bytes name its tensors and nodes."""
    folder = staged[0]
    first, last = ((folder / f"stage-{number}.engine").read_bytes() for number in (1, 2))
    assert b"input_ids" in first
    assert b"input_ids" not in last
    assert b"logits_indices" in last
    assert b"logits_indices" not in first
    assert b"model.layers.0/Add_2:0" in first
    assert b"model.layers.0/Add_2:0 [profile 1]" in last  # its input
    for layer in range(4):
        name = f"model.layers.{layer}.self_attn/Attention".encode()
        assert (name in first, name in last) == (layer == 0, layer > 0)
    for number, engine, owned in ((1, first, "model.embed_tokens.weight"), (2, last, "lm_head.weight")):
        data = (folder / f"stage-{number}.onnx.data").read_bytes()
        tensors = ir.load(folder / f"stage-{number}.onnx").graph.initializers
        start = tensors[owned].const_value.offset
        assert engine.count(data[start : start + 256]) == 1


def test_parity_is_that_of_the_whole_model(staged):
    parity = staged[1].parity
    assert parity.mean_kl < 1e-5
    assert parity.greedy_agreement == parity.greedy_tokens


def test_the_report_has_each_build(staged):
    folder, result, steps = staged
    report = json.loads((folder / "report.json").read_text())["engine"]
    stages = report["stages"]
    assert [stage["layers"]["ATTENTION_INPUT"] for stage in stages] == [1, 3]
    assert report["layers"]["ATTENTION_INPUT"] == 4
    assert report["build_peak_anonymous_bytes"] == max(s["build_peak_anonymous_bytes"] for s in stages)
    assert report["build_seconds"] == pytest.approx(sum(s["build_seconds"] for s in stages))
    assert min(s["build_seconds"] for s in stages) > 0
    for name in ("prefill", "decode"):
        kernels = [sum(stage["kernels"][name].values()) for stage in stages]
        assert sum(kernels) == sum(report["kernels"][name].values()) > kernels[0] > 0
    shares = [done / total for step, done, total in steps if step == "build the engine"]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(result.engine.stages) == 2


def test_commands_show_the_stages(staged, run):
    said = run("inspect", staged[0])[1]
    assert "1: layers 0 ... 0, stage-1.engine of" in said
    assert "2: layers 1 ... 3, stage-2.engine of" in said


def test_validate_runs_the_kept_graphs(staged, run, tmp_path):
    text = tmp_path / "text.ids"
    text.write_text(" ".join(str(5 + i % 300) for i in range(120)))
    code, out, _ = run("validate", staged[0], "--reference", DEMO, "--text", text, "--json")
    assert code == 0
    assert json.loads(out)


def test_without_a_gpu_the_session_says_so(staged):
    with pytest.raises(BundleError, match="CUDA finds no NVIDIA GPU here"):
        Session.open(staged[0])


def test_a_kept_graph_that_somebody_changed_is_refused(staged, tmp_path):
    from bundles import rehash

    folder = tmp_path / "bundle"
    shutil.copytree(staged[0], folder)
    shutil.copyfile(folder / "stage-1.onnx", folder / "stage-2.onnx")
    rehash(folder)
    with pytest.raises(BundleError, match=r"stage-2\.onnx "):
        Session.open(folder)


@pytest.mark.more
def test_bf16_in_int8_by_two_engines_a_stage(tmp_path):
    wanted = dataclasses.replace(options("int8", layout="split"), activations="bf16")
    manifest = export(DEMO, tmp_path / "bundle", wanted).manifest
    names = [f"stage-{number}.{name}.engine" for number in (1, 2) for name in ("prefill", "decode")]
    assert list(manifest.engine_files) == names
    assert not list((tmp_path / "bundle").glob("*.onnx*"))
    assert manifest.engine.layers["DEQUANTIZE"] == 4 * 6 + 1  # gate and up are one product
    assert manifest.kv_cache == "bfloat16"


@pytest.mark.more
def test_parity_in_bf16_runs_without_a_session(tmp_path):
    """ONNX Runtime's CPU provider has no bfloat16 kernels, so no tokens are generated."""
    result = export(DEMO, tmp_path / "bundle", options("bf16", parity=True))
    assert result.parity.greedy_tokens is None
    assert result.parity.mean_kl < 1e-3


@pytest.mark.more
def test_the_benchmark_builds_what_an_export_builds(tmp_path):
    """With weights that are windows of one file, and no engine kept."""
    out, work = tmp_path / "result.json", tmp_path / "work"
    work.mkdir()
    asked = ["--precision", "fp16", "--stages", "2", "--max-seq-len", "1000", "--out", out, "--work", work]
    done = CliRunner().invoke(engine_stages.main, [str(DEMO), *map(str, asked)], catch_exceptions=False)
    assert done.exit_code == 0
    result = json.loads(out.read_text())
    assert [stage["layers"] for stage in result["stages"]] == [2, 2]
    for number, stage in enumerate(result["stages"], 1):
        (entry,) = stage["files"].values()
        assert entry["bytes"] > stage["weight_bytes"]  # no two weights were equal
        assert entry["sha256"] != "0" * 64
        assert stage["build"]["layers"]["ATTENTION_INPUT"] == 2, number
    assert list(work.iterdir()) == []


def test_a_stage_that_lost_a_layer_is_refused(tmp_path, monkeypatch):
    """The network of each stage is compared with the layers of this stage."""
    real = engine_bundle.expected_layers
    counts = []

    def expected(operators, layers, *rest):
        counts.append(layers)
        return real(operators, layers + (len(counts) == 2), *rest)

    monkeypatch.setattr(engine_bundle, "expected_layers", expected)
    with pytest.raises(ExportError, match="the graph has 3 Attention where the model has 4"):
        export(DEMO, tmp_path / "bundle", options())
    assert counts == [1, 3]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("keep_onnx", "least", "most"), [(False, 1.45, 1.55), (True, 2.0, 2.15)])
def test_engines_of_stages_need_less_room_than_the_whole(keep_onnx, least, most):
    """The files of a stage are deleted before the next build: two equal stages need the weights one and a half times."""
    with Checkpoint.load(DEMO) as source:
        (whole,), (staged,) = (
            [
                size
                for _, size in _written(make_plan(source, options(stages=stages, keep_onnx=keep_onnx)), DEMO)
            ]
            for stages in ((), (2,))
        )
        weights = whole / 2.02
    assert least < staged / weights < most


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: said["stages"][0]["profiles"].pop(), "stages.1.profiles are [\"prefill\"], but"),
        (lambda said: said["stages"][1].update(profiles=[]), "stages.2.profiles are [], but"),
        (lambda said: said["engine"].update(profiles=said["stages"][0]["profiles"]), "those of no stage"),
        (lambda said: said["stages"][1].update(profiles=said["stages"][0]["profiles"]), "a file in common"),
        (lambda said: said["files"].pop("stage-2.engine"), "files does not list stage-2.engine"),
        (lambda said: said["stages"].pop(), "stages have 1 layers together, but the model has 4"),
        (lambda said: said["stages"][0]["profiles"][0]["axes"].pop("batch"), "stages.1.profiles.prefill.axes lacks batch"),
    ],
)  # fmt: skip
def test_a_manifest_whose_engines_do_not_fit_is_refused(staged, tmp_path, change, words):
    said = json.loads((staged[0] / "manifest.json").read_text())
    change(said)
    (tmp_path / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    assert words in str(caught.value)
