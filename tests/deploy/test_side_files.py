"""Files beside the weights are compared with the configuration and with each other: before an export's work, and when a
bundle is opened."""

import io
import json
import os
import shutil
from pathlib import Path

import httpx
import pytest
from bundles import rehash

from glm4_deploy import pipeline
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.side_files import compare_side_files
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest
from glm4_runtime.chat_prompts import ChatPrompts
from glm4_runtime.errors import BundleError, CheckpointError, ConfigError, Glm4Error
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.side_files import check_bundle

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "checkpoint")


def edit(folder, name, **values):
    """Set keys of a JSON file; a function makes the new value of the old one."""
    path = folder / name
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for key, value in values.items():
        found[key] = value(found[key]) if callable(value) else value
    path.write_text(json.dumps(found), "utf-8")


def added(number, content="<|beyond|>"):
    return lambda tokens: [*tokens, {**tokens[0], "id": number, "content": content}]


def without(content):
    return lambda tokens: [token for token in tokens if token["content"] != content]


def renamed(content, other):
    return lambda tokens: [{**token, "content": other} if token["content"] == content else token for token in tokens]  # fmt: skip


def beginning_with(number):
    def change(processor):
        processor["special_tokens"]["<sop>"]["ids"] = [number]
        return processor

    return change


def decoder(number, content):
    return lambda tokens: {**tokens, str(number): {"content": content, "special": True}}


# file, its changes, what is refused: both files and both values
REFUSED = {
    "token beyond": ("tokenizer.json", {"added_tokens": added(9999)}, 'tokenizer.json gives "<|beyond|>" the id 9999, but config.json has a vocabulary of 2048'),
    "first token beyond": ("tokenizer.json", {"post_processor": beginning_with(151333)}, "tokenizer.json begins texts with the token id 151333, but config.json has a vocabulary of 2048"),
    "decoder beyond": ("tokenizer_config.json", {"added_tokens_decoder": decoder(9999, "<|new|>")}, 'tokenizer_config.json gives "<|new|>" the id 9999, but config.json has a vocabulary of 2048'),
    "decoder of no number": ("tokenizer_config.json", {"added_tokens_decoder": decoder("9" * 9999, "<|new|>")}, 'tokenizer_config.json gives "<|new|>" the id "999'),
    "decoder of another": ("tokenizer_config.json", {"added_tokens_decoder": decoder(7, "<|user|>")}, 'tokenizer_config.json gives "<|user|>" the id 7, but tokenizer.json as it is read gives it 2045'),
    "added beyond": ("added_tokens.json", {"<|new|>": 9999}, 'added_tokens.json gives "<|new|>" the id 9999, but config.json has a vocabulary of 2048'),
    "added of another": ("added_tokens.json", {"<|user|>": 3}, 'added_tokens.json gives "<|user|>" the id 3, but tokenizer.json as it is read gives it 2045'),
    "pad beyond": ("generation_config.json", {"pad_token_id": 151329}, "generation_config.json says pad_token_id 151329, but config.json has a vocabulary of 2048"),
    "bos of no number": ("generation_config.json", {"bos_token_id": "<sop>"}, 'generation_config.json says bos_token_id "<sop>", but config.json'),
    "renumbered": ("tokenizer.json", {"added_tokens": without("<sop>")}, 'tokenizer.json gives "<eop>" the id 2043, but tokenizer.json as it is read gives it 2042'),
    "template's token": ("tokenizer.json", {"added_tokens": renamed("<|user|>", "<|human|>")}, "writes <|user|>, but tokenizer.json has no such token"),
}  # fmt: skip

WARNED = {
    "end beyond": ("generation_config.json", {"eos_token_id": [2038, 151336]}, "generation_config.json says eos_token_id [151336], which end nothing: config.json has a vocabulary of 2048"),
    "tokenizer's end": ("tokenizer_config.json", {"eos_token": "<|assistant|>"}, 'tokenizer_config.json says eos_token "<|assistant|>", id 2046, but texts end at [2038, 2045, 2047] by generation_config.json'),
    "two configs": ("generation_config.json", {"eos_token_id": [1]}, "config.json says eos_token_id [2038, 2045, 2047], but generation_config.json says [1]"),
    "padding": ("tokenizer_config.json", {"pad_token": "<eop>"}, "tokenizer_config.json says pad_token of id 2043, but config.json says 2038"),
    "unknown role": ("tokenizer_config.json", {"unk_token": "<unk>"}, 'tokenizer_config.json says unk_token "<unk>", but tokenizer.json has no such token'),
    "two maps": ("special_tokens_map.json", {"pad_token": {"content": "<eop>"}}, 'tokenizer_config.json says pad_token "<|endoftext|>", but special_tokens_map.json says "<eop>"'),
    "length": ("tokenizer_config.json", {"model_max_length": 512}, "tokenizer_config.json says model_max_length 512, but config.json has 2048 positions"),
    "labels": ("config.json", {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 1, "yes": 0}}, 'label2id in config.json gives "no" the number 1, but id2label gives this number to "yes"'),
    "two templates": ("tokenizer_config.json", {"chat_template": "another"}, "another chat_template of 7; chat_template.jinja is taken"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_work_together_are_refused_before_the_work(checkpoint, tmp_path, monkeypatch, name):
    file, changes, reason = REFUSED[name]
    edit(checkpoint, file, **changes)
    monkeypatch.setattr(pipeline, "_trace", lambda *_: pytest.fail("the work began"))
    with pytest.raises(CheckpointError) as caught:
        export(checkpoint, tmp_path / "bundle", ExportOptions(parity=False))
    assert reason in str(caught.value)
    assert len(str(caught.value)) <= 500
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", WARNED)
def test_what_is_only_odd_is_a_warning(checkpoint, name):
    file, changes, reason = WARNED[name]
    edit(checkpoint, file, **changes)
    with Checkpoint.load(checkpoint) as source:
        warnings = compare_side_files(source)
    assert [warning for warning in warnings if reason in warning]


def test_an_end_that_the_tokenizer_does_not_know(checkpoint):
    edit(checkpoint, "tokenizer.json", added_tokens=without("<|observation|>"))
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with Checkpoint.load(checkpoint) as source:
        assert "config.json says eos_token_id 2047, but tokenizer.json has no token of this id" in compare_side_files(source)  # fmt: skip


def test_the_demo_gives_no_warning(checkpoint):
    with Checkpoint.load(checkpoint) as source:
        assert compare_side_files(source) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[: len(text) // 2], "is not a tokenizer that can be read"),
        (lambda _: "{}", "is not a tokenizer that can be read"),
        (lambda _: '{"model": ' + "[" * 100_000, "is not a tokenizer that can be read"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(checkpoint, change, reason):
    path = checkpoint / "tokenizer.json"
    path.write_text(change(path.read_text("utf-8")), "utf-8")
    with Checkpoint.load(checkpoint) as source, pytest.raises(CheckpointError, match=reason):
        compare_side_files(source)


def unnamed(tokenizer):
    del tokenizer["post_processor"]["special_tokens"]["<sop>"]


def prefixed(tokenizer):
    tokenizer["model"]["continuing_subword_prefix"] = "x" * 40


@pytest.mark.parametrize("change", [unnamed, prefixed])
def test_a_tokenizer_that_ends_its_reader(checkpoint, bundle, capfd, change):
    """The library panics on these, which is no Exception, writes lines to stderr, and can end the process."""
    for folder in (checkpoint, bundle):
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text("utf-8"))
        change(tokenizer)
        path.write_text(json.dumps(tokenizer), "utf-8")
    with (
        Checkpoint.load(checkpoint) as source,
        pytest.raises(CheckpointError, match="the library that reads it"),
    ):
        compare_side_files(source)
    with (
        Session.open(rehash(bundle)) as session,
        pytest.raises(BundleError, match="the library that reads it"),
    ):
        _ = session.tokenizer
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("what", ["a hole of 1 TiB", "a file of the system"])
def test_files_that_are_no_plain_small_files(checkpoint, name, what):
    path = checkpoint / name
    path.unlink()
    if what == "a hole of 1 TiB":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        path.symlink_to("/proc/self/mem")
    reason = "has 1099511627776 bytes, but at most" if what == "a hole of 1 TiB" else "cannot be read: "
    with pytest.raises(Glm4Error, match=reason), Checkpoint.load(checkpoint) as source:
        compare_side_files(source)


def test_warnings_are_printed_and_kept(checkpoint, tmp_path, run, traced_once):
    edit(checkpoint, "tokenizer_config.json", model_max_length=512)
    code, said, _ = run("export", checkpoint, tmp_path / "bundle", "--no-parity", "--max-seq-len", 64)
    assert code == 0
    assert "model_max_length 512" in said
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert "model_max_length 512" in report["warnings"][0]


# At the opening of a bundle -------------------------------------------------------------------------

# The same comparisons, of which these need no tokenizer.
EARLY = ("decoder beyond", "decoder of no number", "added beyond", "pad beyond", "bos of no number")


@pytest.fixture
def bundle(tmp_path, demo_bundle):
    return shutil.copytree(demo_bundle, tmp_path / "bundle")


def listed(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].setdefault(name, {})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rehash(folder)


def opened_for_chat(folder, early):
    with Session.open(folder) as session:
        assert not early, "Session.open refuses this"
        ChatPrompts(folder, session.tokenizer)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bundle_is_checked_again_when_it_is_opened(bundle, name):
    file, changes, reason = REFUSED[name]
    edit(bundle, file, **changes)
    listed(bundle, file)
    with pytest.raises(BundleError) as caught:
        opened_for_chat(bundle, early=name in EARLY)
    if name == "renumbered":  # a bundle's tokenizer.json is not parsed twice
        reason = 'tokenizer_config.json gives "<eop>" the id 2043'
    if name == "token beyond":
        reason = "tokenizer.json has the token id 2048, but config.json has a vocabulary of 2048"
    assert reason.replace("but config.json", "but manifest.json") in str(caught.value)


@pytest.mark.parametrize("name", ["end beyond", "padding", "length", "two templates"])
def test_commands_say_once_what_is_odd_about_a_bundle(bundle, run, monkeypatch, name):
    file, changes, reason = WARNED[name]
    reason = reason.replace("but config.json", "but manifest.json").replace(
        "which end nothing: config.json", ""
    )
    reason = "end at" if name == "end beyond" else reason  # of a bundle another comparison complains
    edit(bundle, file, **changes)
    listed(bundle, file)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    generating = ("generate", bundle, "x", "--max-tokens", 2)
    for command in (generating, ("chat", bundle, "--max-tokens", 2), ("inspect", bundle)):
        code, said, told = run(*command)
        assert code == 0
        assert (said + told).count(reason) == 1, (command, said, told)
    for command in ((*generating, "--json"), ("inspect", bundle, "--json")):
        code, said, told = run(*command)
        warnings = json.loads(said)["warnings"]
        assert [warning for warning in warnings if reason in warning] == warnings
        assert len(warnings) == 1
        assert reason not in told


def test_a_server_logs_once_what_is_odd_about_a_bundle(bundle, capsys):
    edit(bundle, "tokenizer_config.json", model_max_length=512)
    listed(bundle, "tokenizer_config.json")
    with serving(Session.open(bundle), ServerOptions(port=0)) as server:
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    told = [line for line in lines if line["event"] == "side_files"]
    assert [line["level"] for line in told] == ["warning"]
    assert "model_max_length 512" in told[0]["warning"]


@pytest.mark.parametrize("name", ["token beyond", "pad beyond", "decoder of another"])
def test_inspect_says_what_would_be_refused(checkpoint, bundle, run, name):
    file, changes, _ = REFUSED[name]
    for folder in (checkpoint, bundle):
        edit(folder, file, **changes)
    listed(bundle, file)
    for folder, consequence in ((checkpoint, "export refuses"), (bundle, "no command opens")):
        code, said, _ = run("inspect", folder)
        assert code == 0
        (line,) = [line for line in said.splitlines() if line.lstrip().startswith("warning")]
        assert consequence in line
        assert file in line


def test_inspect_of_a_checkpoint_says_what_is_odd(checkpoint, run):
    assert json.loads(run("inspect", checkpoint, "--json")[1])["warnings"] == []
    edit(checkpoint, "tokenizer_config.json", model_max_length=512)
    assert run("inspect", checkpoint)[1].count("model_max_length 512") == 1
    assert "model_max_length 512" in json.loads(run("inspect", checkpoint, "--json")[1])["warnings"][0]


def test_a_server_refuses_a_template_of_another_tokenizer(bundle):
    edit(bundle, "tokenizer.json", added_tokens=renamed("<|user|>", "<|human|>"))
    with Session.open(rehash(bundle)) as session, pytest.raises(BundleError, match=r"writes <\|user\|>"):
        ServedModel(session, ServerOptions())


def test_the_ends_of_a_bundle_are_those_of_its_manifest(bundle):
    edit(bundle, "generation_config.json", eos_token_id=[1])
    said = (
        "generation_config.json says eos_token_id [1], but texts end at [2038, 2045, 2047] by manifest.json"
    )
    assert said in check_bundle(bundle, read_manifest(bundle))


# JSON of strangers ----------------------------------------------------------------------------------

HOSTILE = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "deep and closed": '{"a":' * 500 + "1" + "}" * 500,
    "twice": '{"eos_token_id": 1, "eos_token_id": 2}',
    "a list": "[1, 2]",
    "no UTF-8": "\xff",
    "digits": '{"a": ' + "9" * 5000 + "}",
    "half a pair": '{"eos_token": "\\ud800"}',
    "a long name": '{"' + "x" * 1_000_000 + '": ',
    "nothing": "",
}
JSON_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("data", HOSTILE)
def test_json_of_strangers_is_refused_in_one_line(checkpoint, bundle, name, data):
    for folder in (checkpoint, bundle):
        (folder / name).write_bytes(HOSTILE[data].encode("latin-1"))
    with pytest.raises(Glm4Error) as exported, Checkpoint.load(checkpoint) as source:
        compare_side_files(source)
    with pytest.raises(BundleError) as opened:
        Session.open(listed(bundle, name))
    for error in (exported.value, opened.value):
        assert isinstance(error, CheckpointError | ConfigError | BundleError)
        assert name in str(error)
        assert str(error).isprintable()
        assert len(str(error)) <= 500


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("../../blobs/gone"), "is a link to a file that does not exist; finish"),
        (os.mkfifo, "is not a file"),
        (Path.mkdir, "is not a file"),
    ],
)
def test_a_side_file_that_cannot_be_read_is_not_left_out(tmp_path, run, name, make, words):
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    (folder / name).unlink()
    make(folder / name)
    for command in (("export", folder, tmp_path / "bundle"), ("inspect", folder)):
        code, _, error = run(*command)
        assert code == 1
        assert f"{name} {words}" in error
    assert not (tmp_path / "bundle").exists()
