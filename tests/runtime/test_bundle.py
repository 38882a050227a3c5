"""The manifest: what is written is read back, and anything else is refused in one line."""

import dataclasses
import hashlib
import json
import os
import shutil

import pytest

from glm4_runtime import BundleError, Session
from glm4_runtime.bundle import (
    EngineInfo,
    EngineProfile,
    FileEntry,
    Limits,
    Manifest,
    ModelInfo,
    TensorSpec,
    file_entry,
    read_manifest,
    sample_of,
    verify_files,
    write_manifest,
)
from glm4_runtime.bundle.files import checked_at_opening
from glm4_runtime.bundle.json_file import parse_object
from glm4_runtime.errors import shown

MANIFEST = Manifest(
    task="sequence-classification",
    target="tensorrt-rtx",
    dialect="tensorrt-rtx",
    precision="fp16",
    activations="float16",
    kv_cache=None,
    model=ModelInfo(
        vocab_size=151552,
        hidden_size=4096,
        num_layers=40,
        num_heads=32,
        num_kv_heads=2,
        head_dim=128,
        max_positions=32768,
        eos_token_ids=(151329, 151336),
        pad_token_id=None,
        labels=("gut", "schlecht", "好"),
    ),
    limits=Limits(32768, 8),
    opsets={"": 24, "com.microsoft": 1},
    inputs=(
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("query_lengths", "int32", ("batch",)),
    ),
    outputs=(TensorSpec("logits", "float32", ("batch", 3)),),
    providers=("CPUExecutionProvider",),
    tensor_precisions={"embedding": "float16"},
    tools={"torch": "2.13.0"},
    config={
        "vocab_size": 151552,
        "rope_parameters": {"rope_theta": 10000.0},
        "none": None,
        "list": [1, True],
    },
    source_sha256="0" * 64,
    files={"model.onnx": FileEntry("1" * 64, 7), "model.engine": FileEntry("3" * 64, 8)},
    pooling="last-token, L2",
    compute_capabilities=("89", "120"),
    engine=EngineInfo(
        kind="tensorrt-rtx",
        version="1.7.1.116",
        layout="shared",
        later_gpus=True,
        attention="native",
        plugin_version=None,
        profiles=(
            EngineProfile("encode", "model.engine", 0, {"batch": (1, 1, 1), "sequence": (1, 512, 2048)}),
        ),
        layers={"ATTENTION_INPUT": 40},
        float32={"RMSNormalization": 161},
        built_from={"model.onnx": FileEntry("2" * 64, 9)},
    ),
)


def refused(folder):
    """The one line that reading the manifest is refused with."""
    with pytest.raises(BundleError) as caught:
        read_manifest(folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 500
    assert "export" in message  # what to do
    return message


@pytest.fixture
def folder(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    return tmp_path


def edit(folder, change):
    path = folder / "manifest.json"
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")
    return folder


def test_round_trip(folder):
    assert read_manifest(folder) == MANIFEST
    assert read_manifest(str(folder)) == MANIFEST


def test_the_text_is_stable_and_sorted(folder, tmp_path):
    text = (folder / "manifest.json").read_text("utf-8")
    write_manifest(folder, read_manifest(folder))
    assert (folder / "manifest.json").read_text("utf-8") == text
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert "好" in text
    assert text.endswith("}\n")


def test_optional_fields_may_be_absent(folder):
    def drop(data):
        for name in ("pooling", "compute_capabilities", "engine", "scaled_bits"):
            del data[name]
        del data["model"]["pad_token_id"], data["files"]["model.onnx"]["sample"]
        data["dialect"] = "native"

    read = read_manifest(edit(folder, drop))
    assert (read.pooling, read.compute_capabilities, read.engine, read.scaled_bits) == (None, (), None, {})
    assert (read.model.pad_token_id, read.files["model.onnx"].sample) == (None, None)


def test_no_bundle_there(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("{}")
    assert "not a folder" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no manifest.json in it" in refused(tmp_path / "empty")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"task": "causal-lm"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'"text"',
        b"{}",
        b"7",
    ],
    ids=["empty", "brace", "truncated", "not utf-8", "deep", "list", "null", "text", "no fields", "number"],
)
def test_what_is_no_manifest(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(data)
    refused(tmp_path)


def test_every_truncation_is_refused(folder):
    data = (folder / "manifest.json").read_bytes()
    for length in range(0, len(data.rstrip()) - 1, 37):
        (folder / "manifest.json").write_bytes(data[:length])
        refused(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_schema_version(folder, version):
    message = refused(edit(folder, lambda data: data.update(schema_version=version)))
    assert f"schema version {shown(version)}" in message
    assert "reads 1" in message


@pytest.mark.parametrize(
    "path",
    [(f.name,) for f in dataclasses.fields(Manifest) if f.name not in ("pooling", "compute_capabilities", "engine", "scaled_bits", "adapters", "adapter_slots", "stages", "files")]
    + [("model", "vocab_size"), ("limits", "max_seq_len"), ("inputs", 0, "dtype"), ("files", "model.onnx", "bytes")],
)  # fmt: skip
def test_a_missing_field_is_named(folder, path):
    def drop(data):
        for step in path[:-1]:
            data = data[step]
        del data[path[-1]]

    message = refused(edit(folder, drop))
    if path != ("schema_version",):
        assert f"lacks {path[-1]}" in message


def test_unknown_fields_are_named(folder):
    assert "has unknown colour" in refused(edit(folder, lambda data: data.update(colour="red")))
    edit(folder, lambda data: data.pop("colour"))
    assert "manifest.model has unknown depth" in refused(
        edit(folder, lambda data: data["model"].update(depth=3))
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("task",), 3),
        (("task",), None),
        (("kv_cache",), 16),
        (("model",), []),
        (("model", "vocab_size"), "151552"),
        (("model", "vocab_size"), 1.5),
        (("model", "vocab_size"), True),
        (("model", "pad_token_id"), "0"),
        (("model", "eos_token_ids"), 3),
        (("model", "eos_token_ids"), [None]),
        (("model", "labels"), {"0": "a"}),
        (("limits",), None),
        (("opsets",), [24]),
        (("opsets", ""), "24"),
        (("inputs",), {}),
        (("inputs", 0), "input_ids"),
        (("inputs", 0, "shape"), "batch"),
        (("inputs", 0, "shape"), [1.5]),
        (("inputs", 0, "shape"), [True]),
        (("providers",), "CPUExecutionProvider"),
        (("tools", "torch"), None),
        (("config",), 1),
        (("source_sha256",), 0),
        (("files",), ["model.onnx"]),
        (("files", "model.onnx"), "1" * 64),
        (("files", "model.onnx", "bytes"), "7"),
        (("pooling",), 1),
        (("compute_capabilities",), [9.0]),
    ],
)
def test_a_wrong_type_is_named_with_its_place(folder, path, value):
    def put(data):
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    message = refused(edit(folder, put))
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    assert f"manifest{place}" in message


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", "", "manifest.json", "report.json", "a/../../x", "model.onnx/", "a\0b"],
)  # fmt: skip
def test_only_plain_file_names_are_listed(folder, name):
    entry = {"sha256": "1" * 64, "bytes": 7}
    assert shown(name) in refused(edit(folder, lambda data: data["files"].update({name: entry})))


def test_file_entry_is_size_and_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_entry(tmp_path / "file") == FileEntry(digest, 3)


def test_verification_names_every_file_that_is_wrong(tmp_path):
    for name in ("gone", "longer", "changed", "good"):
        (tmp_path / name).write_bytes(b"12345678")
    files = {name: file_entry(tmp_path / name) for name in ("gone", "longer", "changed", "good")}
    manifest = dataclasses.replace(MANIFEST, files=files)
    verify_files(tmp_path, manifest)
    verify_files(tmp_path, manifest, hashes=True)
    (tmp_path / "gone").unlink()
    (tmp_path / "longer").write_bytes(b"123456789")
    (tmp_path / "changed").write_bytes(b"12345679")
    for hashes in (False, True):
        with pytest.raises(BundleError) as caught:
            verify_files(tmp_path, manifest, hashes=hashes)
        assert str(caught.value).endswith(
            "is damaged: changed has another SHA-256 than when it was exported; gone is missing; "
            "longer has 9 bytes, not 8. Copy it again or export it again"
        )


# Large files


def large_file(path):
    """65 MiB of zeros with a number at the start of each MiB."""
    with path.open("wb") as file:
        for i in range(65):
            file.seek(i << 20)
            file.write(i.to_bytes(8, "little"))
        file.truncate(65 << 20)
    return path


def test_a_sample_is_64_blocks_from_the_first_to_the_last(tmp_path):
    path = large_file(tmp_path / "weights")
    data = path.read_bytes()
    starts = [i * (64 << 20) // 63 for i in range(64)]
    assert (starts[0], starts[-1]) == (0, len(data) - (1 << 20))
    digest = hashlib.sha256(b"".join(data[at : at + (1 << 20)] for at in starts)).hexdigest()
    assert sample_of(path) == digest
    assert file_entry(path) == FileEntry(hashlib.sha256(data).hexdigest(), 65 << 20, digest)
    os.truncate(path, 64 << 20)
    assert sample_of(path) is None  # hashed whole


@pytest.mark.parametrize(
    ("at", "always"),
    [(0, True), (40 << 20, True), ((65 << 20) - 1, True), ((1 << 20) + 5, False)],  # the last lies between two blocks
)  # fmt: skip
def test_a_changed_byte_of_a_large_file_is_found_where_a_sample_lies_and_else_on_request(
    tmp_path, at, always
):
    path = large_file(tmp_path / "weights")
    manifest = dataclasses.replace(MANIFEST, files={"weights": file_entry(path)})
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"x")
    if always:
        with pytest.raises(BundleError, match="weights has another SHA-256"):
            verify_files(tmp_path, manifest)
    else:
        verify_files(tmp_path, manifest)
    with pytest.raises(BundleError, match="weights has another SHA-256"):
        verify_files(tmp_path, manifest, hashes=True)


def test_a_manifest_without_samples_is_held_to_the_size_of_its_large_files(tmp_path):
    path = large_file(tmp_path / "weights")
    entry = dataclasses.replace(file_entry(path), sample=None)
    manifest = dataclasses.replace(MANIFEST, files={"weights": entry, "small": FileEntry("1" * 64, 7)})
    assert checked_at_opening(manifest) == {"weights": "size", "small": "all"}
    verify_files(tmp_path, dataclasses.replace(manifest, files={"weights": entry}))
    os.truncate(path, (65 << 20) - 1)
    with pytest.raises(BundleError, match="weights has 68157439 bytes, not 68157440"):
        verify_files(tmp_path, dataclasses.replace(manifest, files={"weights": entry}))


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json"])
def test_a_file_that_the_manifest_does_not_know_is_not_read(tmp_path, name):
    (tmp_path / "good").write_bytes(b"12345678")
    manifest = dataclasses.replace(MANIFEST, files={"good": file_entry(tmp_path / "good")})
    (tmp_path / name).write_text("{}")
    with pytest.raises(BundleError, match=f"{name} is not of this bundle"):
        verify_files(tmp_path, manifest)


@pytest.mark.parametrize("name", ["/tmp/other.engine", "../other.engine"])
def test_an_engine_is_a_file_of_the_bundle(folder, name):
    said = refused(edit(folder, lambda data: data["engine"]["profiles"][0].update(file=name)))
    assert f"does not list the engine {shown(name)}" in said


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size"])
def test_a_limit_below_one_is_refused(folder, name):
    said = refused(edit(folder, lambda data: data["limits"].update({name: 0})))
    assert f"limits.{name} is 0, but must be 1 ... " in said


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_session_notices_a_changed_byte(tmp_path, tiny_bundle, name):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    with Session.open(bundle) as session:
        assert session.length(0) == 0
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    for verify in (False, True):
        with pytest.raises(BundleError, match=rf"{name} has another SHA-256.*[Cc]opy it again"):
            Session.open(bundle, verify=verify)


def test_a_session_notices_a_file_cut_short_always(tmp_path, tiny_bundle):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    data = (bundle / "model.onnx.data").read_bytes()
    (bundle / "model.onnx.data").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=f"model.onnx.data has {len(data) - 1} bytes, not {len(data)}"):
        Session.open(bundle)
    (bundle / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.data is missing"):
        Session.open(bundle)


def test_an_exported_manifest_describes_its_folder(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    present = {path.name for path in tiny_bundle.iterdir()}
    assert {*manifest.files, "manifest.json", "report.json"} == present
    for name, entry in manifest.files.items():
        assert entry == file_entry(tiny_bundle / name)


def test_an_unknown_dialect_is_answered_with_the_known_ones(edited_manifest):
    with pytest.raises(BundleError, match=r"dialect 'tflite'; this runtime opens cpu, native, ort"):
        Session.open(edited_manifest(dialect="tflite"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has thousands of digits"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_limits_of_python_are_said_in_words(text, words):
    with pytest.raises(BundleError, match=words):
        parse_object(text, "x.json", BundleError)
