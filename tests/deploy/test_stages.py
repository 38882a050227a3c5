"""``export --stages``: a model in several graphs, each with its own weights and KV cache."""

import io
import json
import shutil

import numpy as np
import onnx
import pytest
from adapters import write_adapter
from checkpoints import parse_config, tiny_config, write_checkpoint
from cpu_operators import needs_cpu_operators
from remote_stages import remote
from staged_calls import assert_equal, driven, scored

from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_deploy.plan import make_plan
from glm4_exporters.architecture import EMBEDDING, HEAD
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.pieces import GraphPieces
from glm4_exporters.stages import stage_list
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import BundleError, ExportError
from glm4_runtime.opening import check_opening, check_stage
from glm4_runtime.session.ort_stage import StageGraphs

CPU_INT8 = pytest.param("cpu", "int8", marks=needs_cpu_operators)
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three layers, with an MLP that is wide enough for the gated product of target cpu."""
    config = tiny_config(num_hidden_layers=3, intermediate_size=128)
    return write_checkpoint(tmp_path_factory.mktemp("stages") / "base", config, dtype="float32")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    config = tiny_config(num_hidden_layers=3, intermediate_size=128, tie_word_embeddings=True)
    return write_checkpoint(tmp_path_factory.mktemp("stages") / "tied", config, dtype="float32")


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory, base):
    """A function that exports once for each set of arguments; a staged bundle of floats is proved by parity."""
    made = {}

    def bundle(target, precision, stages=(), checkpoint=base, **options):
        key = target, precision, stages, checkpoint, str(options)
        if key not in made:
            folder = tmp_path_factory.mktemp("bundles") / "bundle"
            asked = ExportOptions(
                target,
                precision,
                max_batch_size=4,
                stages=stages,
                parity=bool(stages) and precision.startswith("fp"),
                **options,
            )
            made[key] = export(checkpoint, folder, asked).bundle
        return made[key]

    return bundle


@needs_cpu_operators
@pytest.mark.parametrize("change", [lambda session: session, remote], ids=["here", "remote"])
@pytest.mark.parametrize("stages", [(2,), (1, 1, 1)])
def test_every_call_gives_the_bits_of_the_unstaged_bundle(bundle_of, stages, change):
    whole, staged = bundle_of("cpu", "int8"), bundle_of("cpu", "int8", stages)
    for seed in range(4):
        calls = driven(staged, seed, change=change)
        assert sum(isinstance(one, np.ndarray) and one.size > 0 for one in calls) > 10
        assert_equal(calls, driven(whole, seed))


@needs_cpu_operators
def test_answers_and_scores_have_the_bits_of_the_unstaged_bundle(bundle_of):
    staged, whole = (scored(bundle_of("cpu", "int8", stages)) for stages in ((2,), ()))
    assert len(staged[0]) == 24
    assert_equal(staged, whole)


@needs_cpu_operators
def test_positions_of_all_stages_are_copied_to_the_host_and_back(bundle_of):
    """They are those of the unstaged bundle, as a prefix cache on disk needs them."""
    blocks, logits = [], []
    for stages in ((2,), ()):
        with Session.open(bundle_of("cpu", "int8", stages)) as session:
            session.prefill(0, list(range(5, 45)))
            blocks.append(session.read_positions(0, 3, 40))
            session.copy_prefix(0, 2, 3)
            session.append_positions(2, blocks[-1])
            logits += [session.decode({0: 9})[0], session.decode({2: 9})[2]]
            assert session.kernels["operators"]
    np.testing.assert_array_equal(*blocks)
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


@pytest.mark.parametrize(("target", "precision", "cache"), [("ort", "fp32", "auto"), ("ort", "int4", "int8"), ("native", "fp32", "auto")])  # fmt: skip
def test_stages_of_other_targets_compute_the_same(bundle_of, target, precision, cache):
    """ONNX Runtime fuses across layers there, so bits may differ. Parity has proved the staged bundle."""
    ids = list(range(5, 45))
    parts = []
    for stages in ((), (2, 1)):
        with Session.open(bundle_of(target, precision, stages, kv_cache=cache)) as session:
            session.prefill_chunk = 16
            assert session.provider == "CPUExecutionProvider"
            parts.append(np.concatenate([session.prefill(1, ids, "all"), session.decode({1: 9})[1][None]]))
    np.testing.assert_allclose(parts[1], parts[0], atol=1e-4)


def weights_of(folder):
    """Per stage: the names of the weights in its file."""
    manifest, found = read_manifest(folder), []
    for stage in manifest.stages:
        graph = onnx.load(folder / stage.graph, load_external_data=False).graph
        stored = [tensor for tensor in graph.initializer if tensor.external_data]
        assert {e.value for t in stored for e in t.external_data if e.key == "location"} == {stage.weights}
        found.append({tensor.name for tensor in stored})
    return found


def test_each_stage_has_the_weights_of_its_layers_alone(bundle_of):
    folder = bundle_of("ort", "fp32", (2, 1))
    first, last = weights_of(folder)
    tables = {"rotary.cos", "rotary.sin"}
    assert first & last == tables
    assert {name.split(".")[2] for name in first if name.startswith("model.layers")} == {"0", "1"}
    assert {name.split(".")[2] for name in last if name.startswith("model.layers")} == {"2"}
    assert {EMBEDDING} == first & {EMBEDDING, HEAD, NORM}
    assert {HEAD, NORM} == last & {EMBEDDING, HEAD, NORM}


def test_a_tied_table_is_in_the_first_and_the_last_stage(bundle_of, tied):
    first, middle, last = weights_of(bundle_of("ort", "fp32", (1, 1, 1), tied))
    assert EMBEDDING in first & last
    assert EMBEDDING not in middle


@pytest.mark.parametrize(("target", "precision"), [("ort", "int8"), CPU_INT8])
def test_a_tied_bundle_computes_the_same(bundle_of, tied, target, precision):
    ids = list(range(5, 45))
    found = []
    for stages in ((), (2,)):
        with Session.open(bundle_of(target, precision, stages, tied)) as session:
            found.append(session.prefill(0, ids, "all"))
    np.testing.assert_allclose(found[1], found[0], atol=0 if target == "cpu" else 1e-4)


@needs_cpu_operators
def test_calibrated_and_merged_weights_are_those_of_the_unstaged_bundle(tied, tmp_path):
    """GPTQ's numbers of a tied table are written twice, and a merged adapter changes both stages."""
    text = tmp_path / "text.ids"
    text.write_text(" ".join(str(5 + i % 300) for i in range(600)))
    adapter = write_adapter(tied, tmp_path / "adapter", seed=1, target_modules=["q_proj", "down_proj"], r=4)
    found = {}
    for name, stages in {"whole": (), "staged": (2,)}.items():
        options = ExportOptions("cpu", "int4", calibration=str(text), adapters=((str(adapter), 1.0),), stages=stages, parity=False)  # fmt: skip
        manifest = export(tied, tmp_path / name, options).manifest
        with Session.open(tmp_path / name) as session:
            found[name] = manifest.source_sha256, session.prefill(0, list(range(5, 45)), "all")
    assert found["staged"][0] == found["whole"][0]
    np.testing.assert_array_equal(found["staged"][1], found["whole"][1])


def test_stages_share_the_bytes(bundle_of):
    """Files are mapped, so that their sizes are the memory of a stage."""
    whole = read_manifest(bundle_of("ort", "fp32")).files["model.onnx.data"].bytes
    folder = bundle_of("ort", "fp32", (2, 1))
    manifest = read_manifest(folder)
    sizes = [manifest.files[stage.weights].bytes for stage in manifest.stages]
    assert sizes == [(folder / stage.weights).stat().st_size for stage in manifest.stages]
    assert sum(sizes) == whole + 2 * 4096  # tables of cosines and sines: 256 positions of 4 numbers
    assert 0.5 < sizes[0] / whole < 0.75


@pytest.mark.parametrize(
    ("config", "count", "wanted"),
    [
        # GLM-4-9B and GLM-4-32B: the embedding and the head weigh as much as three and two layers
        (dict(num_hidden_layers=40, hidden_size=4096, intermediate_size=13696, num_attention_heads=32, head_dim=128, vocab_size=151552), 4, [8, 12, 12, 8]),
        (dict(num_hidden_layers=61, hidden_size=6144, intermediate_size=23040, num_attention_heads=48, head_dim=128, vocab_size=151552), 2, [30, 31]),
        (dict(num_hidden_layers=3), 3, [1, 1, 1]),
        (dict(num_hidden_layers=4, vocab_size=320_000), 2, [2, 2]),
        (dict(num_hidden_layers=5, vocab_size=320_000), 4, [1, 1, 2, 1]),
    ],
)  # fmt: skip
def test_a_count_is_balanced_by_weights(config, count, wanted):
    found = [stage.layers for stage in stage_list(parse_config(**config), "causal-lm", (count,))]
    assert sum(found) == config["num_hidden_layers"]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(stages=(0,)), "2 ... 3 stages"),
        (dict(stages=(1,)), "2 ... 3 stages"),
        (dict(stages=(4,)), "2 ... 3 stages"),
        (dict(stages=(2, 2)), "has 4 layers, but this model has 3"),
        (dict(stages=(3, 0)), "at least 1"),
        (dict(stages=(2,), lora_slots=2), "no adapters at run time"),
        (dict(stages=(2,), task="encoder"), "the task is encoder"),
        (dict(stages=(2,), precision="bf16"), "no bfloat16 kernels"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_line(base, tmp_path, options, words):
    with pytest.raises(ExportError) as caught:
        export(base, tmp_path / "bundle", ExportOptions(**options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_one_layer_is_not_cut():
    with pytest.raises(ExportError, match="at least 2 layers"):
        stage_list(parse_config(num_hidden_layers=1), "causal-lm", (2,))


def test_a_count_and_its_list_are_one_export(base):
    with Checkpoint.load(base) as source:
        plans = [make_plan(source, ExportOptions(stages=stages)) for stages in ((3,), (1, 1, 1))]
    assert plans[0] == plans[1]
    keys = [cache_key(base, ExportOptions(stages=stages)) for stages in ((), (3,), (1, 1, 1), (1, 2))]
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3


def test_two_exports_are_the_same_bytes(bundle_of, base, tmp_path):
    """Sets of names have another order in each process; the graph's order does not depend on them."""
    options = ExportOptions("ort", "fp32", max_batch_size=4, stages=(2, 1), parity=False)
    again, first = export(base, tmp_path / "again", options).manifest, read_manifest(bundle_of("ort", "fp32", (2, 1)))  # fmt: skip
    assert again.files == first.files
    graph = onnx.load(tmp_path / "again" / "stage-2.onnx", load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer]
    places = [int(e.value) for t in graph.initializer for e in t.external_data if e.key == "offset"]
    assert places == sorted(places)
    assert names


# Parity and pieces --------------------------------------------------------------------------------


def test_pieces_run_every_stages_own_weights(bundle_of, tied, tmp_path):
    """A change in the last stage's copy of the table changes the joined graph's logits."""
    from glm4_deploy.parity import graph_inputs

    folder = tmp_path / "bundle"
    shutil.copytree(bundle_of("ort", "fp32", (1, 1, 1), tied), folder)
    manifest = read_manifest(folder)
    inputs = [graph_inputs(manifest, [5, 6, 7])]
    before = GraphPieces(folder).run(inputs)[0]
    assert before.keys() == {spec.name for spec in manifest.outputs}
    graph = onnx.load(folder / "stage-3.onnx", load_external_data=False).graph
    table = next(tensor for tensor in graph.initializer if tensor.name == EMBEDDING)
    offset = int(next(entry.value for entry in table.external_data if entry.key == "offset"))
    with (folder / "stage-3.onnx.data").open("r+b") as file:
        file.seek(offset)
        file.write(np.full(64, 3.0, np.float32).tobytes())
    assert not np.array_equal(GraphPieces(folder).run(inputs)[0]["logits"], before["logits"])


def test_validate_walks_all_layers_of_a_staged_bundle(run, bundle_of, base, tmp_path):
    """The per-layer errors are those of the unstaged bundle, up to rounding."""
    text = tmp_path / "text.ids"
    text.write_text(" ".join(str(5 + i % 300) for i in range(120)))
    found = []
    for stages in ((2, 1), ()):
        folder = bundle_of("ort", "fp32", stages)
        code, out, err = run("validate", folder, "--reference", base, "--text", text, "--json")
        assert (code, err.count("Traceback")) == (0, 0)
        found.append(json.loads(out))
    assert found[0].keys() == found[1].keys()


# Damage -------------------------------------------------------------------------------------------


def test_a_missing_or_foreign_stage_is_refused(bundle_of, tied, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_of("ort", "fp32", (2, 1)), folder)
    (folder / "stage-2.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"stage-2\.onnx\.data is missing"):
        Session.open(folder)
    other = tmp_path / "other"
    shutil.copytree(bundle_of("ort", "fp32", (2, 1)), other)
    foreign = bytearray((other / "stage-2.onnx.data").read_bytes())
    foreign[:64] = bytes(64)
    (folder / "stage-2.onnx.data").write_bytes(foreign)
    with pytest.raises(BundleError, match="another SHA-256"):
        Session.open(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stages: stages.pop(), "stages have 2 layers together, but the model has 3"),
        (lambda stages: stages[1].update(first_layer=1), "stages.2.first_layer is 1"),
        (lambda stages: stages[1].update(layers=0), "stages.2.layers is 0"),
        (lambda stages: stages[1].update(graph="stage-3.onnx"), "files does not list stage-3.onnx"),
        (lambda stages: stages[1].update(weights="stage-1.onnx.data"), "two stages have a file in common"),
        (lambda stages: stages[1].update(graph="stage-1.onnx"), "two stages have a file in common"),
        (lambda stages: (stages[0].update(layers=1), stages[1].update(first_layer=1, layers=2)), "stage-1.onnx has other"),
    ],
)  # fmt: skip
def test_a_manifest_whose_stages_do_not_fit_is_refused(bundle_of, tmp_path, change, words):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_of("ort", "fp32", (2, 1)), folder)
    said = json.loads((folder / "manifest.json").read_text())
    change(said["stages"])
    (folder / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(BundleError) as caught:
        Session.open(folder)
    assert words in str(caught.value)


def test_adapters_at_run_time_are_refused(bundle_of, tmp_path):
    with Session.open(bundle_of("ort", "fp32", (2, 1))) as session:
        with pytest.raises(BundleError, match="stages, which take no adapters at run time"):
            session.load_adapter("a", tmp_path)
        assert session.adapters == ()


def test_another_provider_is_refused(bundle_of):
    with pytest.raises(BundleError, match="stages run on the CPU only"):
        Session.open(bundle_of("ort", "fp32", (2, 1)), provider="CUDAExecutionProvider")


# The command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "two", "1,,2", "-2", "2.5", "1,2,", "9" * 400])
def test_values_that_are_no_counts(run, base, tmp_path, value):
    code, out, err = run("export", base, tmp_path / "bundle", "--stages", value)
    assert code == 2
    assert out == ""
    assert "neither a count of stages, as 2, nor a list of layer counts, as 20,20" in err


def test_a_process_opens_a_stage_with_the_files_of_this_stage_alone(bundle_of, tmp_path):
    """And the session's process needs the other files only."""
    folder = bundle_of("ort", "fp32", (2, 1))
    manifest, parts = read_manifest(folder), [tmp_path / "first", tmp_path / "second"]
    for stage, part in zip(manifest.stages, parts, strict=True):
        part.mkdir()
        for name in ("manifest.json", stage.graph, stage.weights):
            shutil.copy(folder / name, part)
        check_stage(part, manifest, stage, hashes=True)
    graphs = StageGraphs(parts[1], manifest, None, 1)
    graphs.open(manifest.stages[1], 2).close()
    with pytest.raises(BundleError, match=r"stage-2.onnx is missing; stage-2.onnx.data is missing"):
        check_stage(parts[0], manifest, manifest.stages[1])
    with pytest.raises(BundleError, match="is missing"):
        check_opening(parts[0], manifest, stages=False)
    rest = tmp_path / "rest"
    shutil.copytree(folder, rest, ignore=shutil.ignore_patterns("stage-*"))
    check_opening(rest, manifest, stages=False)
    with pytest.raises(BundleError, match=r"stage-1.onnx is missing"):
        check_opening(rest, manifest)
    with (parts[1] / "stage-2.onnx.data").open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(BundleError, match="another SHA-256"):
        check_stage(parts[1], manifest, manifest.stages[1])


@needs_cpu_operators
def test_commands_on_the_demo(run, demo_staged, demo_cpu):
    said = run("inspect", demo_staged)[1]
    assert "1: layers 0 ... 0, stage-1.onnx.data" in said
    assert "2: layers 1 ... 3, stage-2.onnx.data" in said
    path = demo_staged / "manifest.json"
    manifest = json.loads(path.read_text())
    for stage in manifest["stages"]:
        del stage["profiles"]  # as in bundles made before stages could be engines
    path.write_text(json.dumps(manifest))
    assert run("inspect", demo_staged)[1] == said
    answers = [
        run("generate", folder, "Once upon a time", "--max-tokens", 12, "--json")
        for folder in (demo_staged, demo_cpu)
    ]
    assert answers[0][0] == 0
    texts = [json.loads(out)["text"] for _, out, _ in answers]
    assert texts[0] == texts[1]
    assert texts[0]
    code, out, _ = run("bench", demo_staged, "--prefill", 8, "--batch", 2, "--context", 4, "--steps", 2, "--rounds", 1, "--json")  # fmt: skip
    assert code == 0
    manifest = read_manifest(demo_staged)
    assert json.loads(out)["weight_bytes"] == sum(manifest.files[s.weights].bytes for s in manifest.stages)


@needs_cpu_operators
def test_chat_answers_as_with_the_unstaged_bundle(run, demo_staged, demo_cpu, monkeypatch, tmp_path):
    """Also with a prefix cache, from which the second conversation starts."""
    said = []
    for folder, cache in ((demo_cpu, ()), (demo_staged, ()), *[(demo_staged, ("--cache", tmp_path))] * 2):
        monkeypatch.setattr(
            "sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is the capital of France?\nWhy?\n"))
        )
        code, out, _ = run("chat", folder, "--max-tokens", 24, "--seed", 3, *cache)
        assert code == 0
        said.append(out)
    assert said[0].strip()
    assert said == said[:1] * 4


@needs_cpu_operators
def test_the_server_answers_as_for_the_unstaged_bundle(demo_staged, demo_cpu):
    import httpx

    from glm4_runtime.server import ServerOptions
    from glm4_runtime.server.run import serving

    body = {
        "model": "m",
        "prompt": "Once upon a time",
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 5,
        "n": 3,
    }
    texts = []
    for folder in (demo_staged, demo_cpu):
        with serving(Session.open(folder), ServerOptions(port=0, served_name="m")) as server:
            found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            texts.append([choice["text"] for choice in found["choices"]])
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]
