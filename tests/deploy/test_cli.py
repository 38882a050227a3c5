"""The command line: exit codes, one line per refusal, results on stdout and all else on stderr."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from bundles import rehash
from checkpoints import tiny_config, write_checkpoint
from click.testing import CliRunner

from glm4_deploy import pipeline
from glm4_deploy.cli import COMMAND_SUMMARIES, COMMANDS, cli, main
from glm4_deploy.examples import HELP_EXAMPLES
from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_runtime.bundle import file_entry

ROOT = Path(__file__).parents[2]
GLM4_DEPLOY = (sys.executable, "-c", "from glm4_deploy.cli import main; main()")  # as its script does
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A checkpoint with a tokenizer of 320 words and a chat template, and its bundle."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("worded")
    checkpoint = write_checkpoint(folder / "checkpoint", tiny_config())
    words = ["<unk>", *(f"w{i}" for i in range(1, 320))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    export(checkpoint, folder / "bundle", ExportOptions("ort", "fp32", parity=False))
    return folder


@pytest.fixture
def traced_before(tiny_bundles, monkeypatch):
    """Take the graph from a bundle: tracing is most of a small export's time."""
    import onnx_ir as ir

    def trace(plan, prepared):
        model = ir.load(tiny_bundles["ort"] / "model.onnx")
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = None
        return model

    monkeypatch.setattr(pipeline, "_trace", trace)


def one_line(stderr):
    """The only line of a refusal, without the program's name."""
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("glm4-deploy: ")
    return lines[0].removeprefix("glm4-deploy: ")


# Help ---------------------------------------------------------------------------------------------


def test_the_tables_list_the_same_commands():
    assert COMMANDS.keys() == COMMAND_SUMMARIES.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(cli, [command, flag])
        assert result.exit_code == 0
        assert f" {command} " in result.output
        # these two talk until they are told to end: they have no result to print
        assert ("--json" in result.output) != (command in ("serve", "chat"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_the_help_are_lines_that_it_takes(command):
    assert HELP_EXAMPLES[command]
    for _, line in HELP_EXAMPLES[command]:
        name, *arguments = shlex.split(line)
        assert name == command
        with cli.get_command(None, command).make_context(name, arguments) as context:
            assert context.params
        assert f"glm4-deploy {line}" in " ".join(CliRunner().invoke(cli, [command, "-h"]).output.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command):
    options = [param for param in cli.get_command(None, command).params if isinstance(param, click.Option)]
    assert options
    assert not [option.name for option in options if not option.help]


def test_help_lists_commands_and_exit_codes():
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for text in (*COMMAND_SUMMARIES.values(), *COMMANDS, "Exit codes: 0 done"):
        assert text in " ".join(result.output.split())


def test_help_and_reading_import_no_torch(worded):
    """In fresh processes, all at once in one: help of everything, inspect of both, doctor, a key."""
    program = f"""
import sys
from glm4_deploy.cli import main
for arguments in (
    ["--help"], ["--version"], ["export", "--help"], ["generate", "--help"], ["inspect", "--help"],
    ["doctor", "--help"], ["inspect", {str(worded / "checkpoint")!r}], ["inspect", {str(worded / "bundle")!r}],
    ["export", {str(worded / "checkpoint")!r}, "--print-key"], ["generate", {str(worded / "bundle")!r}, "w5"],
):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
    loaded = {{"torch", "onnx", "transformers"}} & set(sys.modules)
    assert not loaded, (arguments, loaded)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# Wrong usage: 2 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage"),
        (["--colour"], "No such option"),
        (["exprot"], "No such command"),
        (["export"], "Missing argument 'CHECKPOINT'"),
        (["export", "somewhere"], "Missing argument 'BUNDLE'"),
        (["export", "a", "b", "c"], "unexpected extra argument"),
        (["export", "a", "b", "--target", "coreml"], "'coreml' is not one of 'ort', 'cpu', 'native'"),
        (["export", "a", "b", "--precision", "int3"], "'int3' is not one of 'fp32', 'fp16', 'bf16'"),
        (["export", "a", "b", "--task", "chat"], "'chat' is not one of"),
        (["export", "a", "b", "--max-seq-len", "many"], "'many' is not a valid integer"),
        (["export", "a", "b", "--max-batch-size", "1.5"], "'1.5' is not a valid integer"),
        (["generate", "a"], "Missing argument 'PROMPT'"),
        (["generate", "a", "b", "--system", "be brief"], "--system needs --chat"),
        (["generate", "a", "b", "--stream", "--json"], "--stream and --json exclude each other"),
        (["generate", "a", "b", "--temperature", "hot"], "'hot' is not a valid float"),
        (["generate", "a", "b", "--threads", "0"], "0 is not in the range x>=1"),
        (["inspect"], "Missing argument 'PATH'"),
        (["doctor", "--all"], "No such option"),
    ],
)
def test_wrong_usage(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


# Refused: 1 ---------------------------------------------------------------------------------------


def test_what_is_no_checkpoint(run, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path / "file", "is a file; give the folder"),
        (tmp_path / "empty", "config.json"),
    ):
        for arguments in (
            ("export", path, tmp_path / "bundle"),
            ("export", path, "--print-key"),
            ("inspect", path),
        ):
            code, out, err = run(*arguments)
            assert (code, out) == (1, "")
            assert message in one_line(err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_what_is_no_bundle(run, tmp_path, tiny_checkpoint):
    (tmp_path / "file").write_text("x")
    for path, message in (
        (tmp_path / "nowhere", "is not a bundle (no such folder)"),
        (tmp_path / "file", "is a file; give a bundle's folder"),
        (
            tiny_checkpoint,
            f"is a checkpoint, not a bundle; make a bundle of it: glm4-deploy export {tiny_checkpoint} BUNDLE",
        ),
    ):
        code, out, err = run("generate", path, "hello")
        assert (code, out) == (1, "")
        assert message in one_line(err)


def test_a_damaged_bundle(run, tmp_path, worded):
    bundle = tmp_path / "bundle"
    shutil.copytree(worded / "bundle", bundle)
    (bundle / "model.onnx.data").unlink()
    assert "model.onnx.data is missing" in one_line(run("generate", bundle, "w5")[2])
    (bundle / "manifest.json").write_text("{")
    for command in (("generate", bundle, "w5"), ("inspect", bundle)):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert "manifest.json is damaged, it is no JSON" in one_line(err)


def test_a_graph_that_no_runtime_opens(run, tmp_path, worded):
    bundle = tmp_path / "bundle"
    shutil.copytree(worded / "bundle", bundle)
    size = (bundle / "model.onnx").stat().st_size
    (bundle / "model.onnx").write_bytes(b"\xff" * size)
    for flags in ([], ["--verify"]):
        code, _, err = run("generate", bundle, "w5", *flags)
        assert code == 1
        assert "model.onnx has another SHA-256" in one_line(err)
    assert "is no ONNX graph" in one_line(run("generate", rehash(bundle), "w5")[2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "1.1"], "top_p"),
        (["--top-k", "-1"], "top_k"),
        (["--min-p", "2"], "min_p"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--frequency-penalty", "inf"], "frequency_penalty"),
        (["--presence-penalty", "-inf"], "presence_penalty"),
        (["--stop", ""], "stop"),
        (["--seed", str(2**64)], "seed"),
        (["--provider", "TPU"], "TPU cannot run this bundle"),
        (["--max-seq-len", "0"], "max_seq_len is 0"),
        (["--max-seq-len", "9999"], "max_seq_len is 9999, but this bundle allows 1 ... 256"),
        (["--max-seq-len", "1"], "the prompt has 2 tokens"),
    ],
)
def test_values_that_cannot_be(run, worded, flags, message):
    code, out, err = run("generate", worded / "bundle", "w5 w6", *flags)
    assert (code, out) == (1, "")
    assert message in one_line(err)


def test_bundles_without_what_generating_needs(run, tmp_path, tiny_bundle, worded):
    assert "has no tokenizer.json" in one_line(run("generate", tiny_bundle, "hello")[2])
    assert "no tokens" in one_line(run("generate", worded / "bundle", "")[2])
    bundle = tmp_path / "bundle"
    shutil.copytree(worded / "bundle", bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["chat_template.jinja"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / "chat_template.jinja").unlink()
    code, out, err = run("generate", bundle, "w5", "--chat")
    assert (code, out) == (1, "")
    assert "template" in one_line(err)


def test_export_into_what_is_in_the_way(run, worded):
    code, out, err = run("export", worded / "checkpoint", worded / "bundle")
    assert (code, out) == (1, "")
    assert "replace it with --force" in one_line(err)


# The gate: 3 --------------------------------------------------------------------------------------


def test_a_failed_gate_is_exit_code_3(run, tmp_path, tiny_checkpoint, traced_before, monkeypatch):
    real = pipeline._write_model

    def damage(plan, source, model, prepared, folder, progress):
        written, parts = real(plan, source, model, prepared, folder, progress)
        data = folder / "model.onnx.data"
        data.write_bytes(bytes([0x3F] * data.stat().st_size))  # every weight 0.747, the rotary tables too
        return dataclasses.replace(written, files=(file_entry(data),)), parts

    monkeypatch.setattr(pipeline, "_write_model", damage)
    code, out, err = run("export", tiny_checkpoint, tmp_path / "bundle", "--precision", "fp32")
    assert (code, out) == (3, "")
    assert "does not match the reference in fp32: max abs error" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# Done: 0 ------------------------------------------------------------------------------------------


def test_the_key_is_all_that_is_printed(run, tiny_checkpoint):
    code, out, err = run(
        "export", tiny_checkpoint, "--print-key", "--precision", "bf16", "--target", "native"
    )
    assert (code, err) == (0, "")
    assert out == cache_key(tiny_checkpoint, ExportOptions("native", "bf16")) + "\n"
    assert len(out) == 65
    assert int(out, 16)


def test_the_key_by_content_is_that_of_every_copy(run, tmp_path, tiny_checkpoint):
    """A fresh download has other times; in a hub cache the file is a link to a blob named by its SHA-256."""
    fresh = shutil.copytree(tiny_checkpoint, tmp_path / "fresh")
    os.utime(fresh / "model.safetensors", (1, 1))
    cached = shutil.copytree(tiny_checkpoint, tmp_path / "cached")
    blob = tmp_path / "blobs" / file_entry(cached / "model.safetensors").sha256
    blob.parent.mkdir()
    (cached / "model.safetensors").rename(blob)
    (cached / "model.safetensors").symlink_to(blob)
    changed = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    with (changed / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    folders = (tiny_checkpoint, fresh, cached, changed)
    content = [run("export", folder, "--print-key", "--key", "content")[1] for folder in folders]
    assert content[0] == content[1] == content[2] != content[3]
    quick = [run("export", folder, "--print-key")[1] for folder in folders]
    assert len({*quick}) == 4
    code, _, err = run("export", tiny_checkpoint, tmp_path / "bundle", "--key", "content")
    assert code == 2
    assert "--key needs --print-key" in err


def test_a_real_export_keeps_results_and_progress_apart(tmp_path, tiny_checkpoint):
    command = [*GLM4_DEPLOY, "export", tiny_checkpoint, tmp_path / "bundle", "--precision", "fp32", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["bundle"] == str(tmp_path / "bundle")
    assert result["parity"]["max_abs_error"] < 2e-4
    assert result["files"]["model.onnx.data"] == (tmp_path / "bundle" / "model.onnx.data").stat().st_size
    stages = done.stderr.splitlines()
    wanted = ["trace the model", "write weights", "run the reference's layers", "run the bundle's layers"]
    found = [next((stage for stage in wanted if line.startswith(stage)), None) for line in stages]
    assert [stage for stage in found if stage] == wanted
    assert not [line for line in stages if "Warning" in line or line.startswith("[torch")]


def test_the_summary_of_an_export(run, tmp_path, tiny_checkpoint, traced_before):
    code, out, err = run("export", tiny_checkpoint, tmp_path / "bundle", "--precision", "fp32", "--no-parity")
    assert code == 0
    assert "parity       not measured (--no-parity)" in out
    assert "CPUExecutionProvider" in out
    assert out.splitlines()[0] == str(tmp_path / "bundle")
    assert "write weights" in err
    assert "write weights" not in out


def test_generate_prints_text_json_or_a_stream(run, worded):
    arguments = ("generate", worded / "bundle", "w5 w6", "--max-tokens", "6", "--ignore-eos")
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["prompt_tokens"] == 2
    assert len(result["token_ids"]) == 6
    assert result["finish_reason"] == "length"
    assert result["provider"] == "CPUExecutionProvider"
    plain = run(*arguments)
    assert plain == (0, result["text"] + "\n", "")
    assert run(*arguments, "--stream") == plain
    assert run(*arguments, "--verify", "--threads", "1")[1] == plain[1]


def test_sampling_is_a_function_of_the_seed(run, worded):
    arguments = (
        "generate",
        worded / "bundle",
        "w5",
        "--max-tokens",
        "12",
        "--temperature",
        "2",
        "--ignore-eos",
    )
    one, again, other = (run(*arguments, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == again != other


def test_chat_sends_the_rendered_template(run, worded, monkeypatch):
    from glm4_runtime.tokenizer import Tokenizer

    seen, real = [], Tokenizer.encode

    def encode(self, text, add_special_tokens=True):
        seen.append((text, add_special_tokens))
        return real(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    arguments = ("generate", worded / "bundle", "w5", "--chat", "--max-tokens", "1")
    assert run(*arguments)[0] == 0
    assert run(*arguments, "--system", "w9")[0] == 0
    assert seen == [("<user>w5", False), ("<system>w9<user>w5", False)]


def generate_from(worded, stdin, **options):
    command = [*GLM4_DEPLOY, "generate", worded / "bundle", "-", "--max-tokens", "3"]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, **options)


def test_a_prompt_from_standard_input(run, worded):
    done = generate_from(worded, b"w5 w6\n")
    assert done.stdout.decode() == run("generate", worded / "bundle", "w5 w6", "--max-tokens", "3")[1]
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_a_prompt_that_is_no_text(worded, encoding):
    done = generate_from(worded, b"w5 \xff\xfe", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 1
    assert "standard input is not text: " in one_line(done.stderr.decode())


@pytest.mark.parametrize("flags", [["--json"], []])  # more than a buffer, and less
def test_a_reader_that_has_seen_enough(worded, flags):
    """As `| head -0` does: no traceback, no noise, and not an error."""
    command = [*GLM4_DEPLOY, "inspect", worded / "bundle", *flags]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_defect_keeps_its_traceback(monkeypatch, worded):
    import glm4_deploy.commands.inspect as module

    monkeypatch.setattr(module, "inspect", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(worded)])


def test_an_export_goes_on_though_nobody_reads_of_it(tmp_path, tiny_checkpoint, traced_before, monkeypatch):
    """`2>&1 | head -1` must not end a build, least of all with exit code 0."""

    class Gone:
        def write(self, _):
            raise BrokenPipeError

        flush = isatty = lambda *_: None

    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tiny_checkpoint), str(tmp_path / "bundle"), "--precision", "fp32", "--no-parity"])
    assert ended.value.code == 0
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_the_shells_completion():
    command = [str(Path(sys.executable).with_name("glm4-deploy"))]
    for shell in ("bash", "zsh", "fish"):
        environment = os.environ | {"_GLM4_DEPLOY_COMPLETE": f"{shell}_source"}
        source = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "_GLM4_DEPLOY_COMPLETE" in source.stdout, source.stderr
    asked = {"COMP_WORDS": "glm4-deploy val", "COMP_CWORD": "1", "_GLM4_DEPLOY_COMPLETE": "bash_complete"}
    found = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
    assert found.stdout == "plain,validate\n"
