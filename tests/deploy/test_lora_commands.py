"""``--lora`` of the commands that run a bundle."""

import json
import subprocess
import sys

import pytest
from adapters import rewrite, write_adapter
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import needs_cpu_operators

from glm4_deploy.pipeline import ExportOptions, cache_key
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest

PROMPT = "The capital of France is"
pytestmark = needs_cpu_operators


def greedy(session, count=12):
    ids = session.tokenizer.encode(PROMPT)
    return [token.id for token, _ in zip(session.generate(ids), range(count), strict=False)]


def test_export_with_slots(tmp_path, run, tiny_checkpoint):
    bundle = tmp_path / "bundle"
    options = ("--target", "cpu", "--lora-slots", 2, "--lora-rank", 16)
    code, out, err = run("export", tiny_checkpoint, bundle, *options)
    assert code == 0, err
    assert "2 at run time, of rank up to 16" in out
    manifest = read_manifest(bundle)
    slots = manifest.adapter_slots
    assert (slots.count, slots.rank, slots.base) == (2, 16, None)
    assert slots.matrices["model.layers.0.mlp.down_proj"] == (64, 96)
    assert "model.lora.onnx" in manifest.files
    code, out, err = run("inspect", bundle)
    assert code == 0, err
    assert "2 at run time, of rank up to 16" in out
    code, _, err = run("export", tiny_checkpoint, bundle, "--force", "--lora-rank", 16)
    assert code == 2
    assert "--lora-rank needs --lora-slots" in err


def test_slots_change_the_cache_key(tiny_checkpoint):
    options = [ExportOptions("cpu"), ExportOptions("cpu", lora_slots=1), ExportOptions("cpu", lora_slots=2)]
    options.append(ExportOptions("cpu", lora_slots=2, lora_rank=8))
    assert len({cache_key(tiny_checkpoint, each) for each in options}) == 4


def test_slots_change_no_byte_of_the_base(tmp_path, run, tiny_checkpoint):
    for name, options in (("plain", ()), ("slots", ("--lora-slots", 4))):
        code, _, err = run("export", tiny_checkpoint, tmp_path / name, "--target", "cpu", *options)
        assert code == 0, err
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "slots" / file).read_bytes()


def test_generate(run, demo_slots, demo_adapters):
    with Session.open(demo_slots) as session:
        session.load_adapter("poet", demo_adapters["poet"])
        session.adapter = "poet"
        expected = greedy(session)
        session.adapter = None
        assert greedy(session) != expected
    options = ("--temperature", 0, "--max-tokens", 12, "--json", "--ignore-eos")
    code, out, err = run("generate", demo_slots, PROMPT, *options, "--lora", demo_adapters["poet"])
    assert code == 0, err
    assert json.loads(out)["token_ids"] == expected


def test_bench(run, demo_slots, demo_adapters):
    options = ("--prefill", 8, "--batch", "1,2", "--context", 8, "--steps", 2, "--rounds", 1, "--json")
    code, out, err = run("bench", demo_slots, *options, "--lora", demo_adapters["clerk"])
    assert code == 0, err
    report = json.loads(out)
    assert report["lora"] == str(demo_adapters["clerk"])
    assert report["decode"]["2"]["median"] > 0


@pytest.mark.parametrize("command", ["generate", "chat", "bench"])
def test_what_cannot_be_applied_is_one_line(run, demo_cpu, demo_slots, tmp_path, command):
    small = ("--prefill", 8, "--batch", 1, "--context", 8, "--steps", 1)
    prompt = {"generate": (PROMPT,), "bench": small}.get(command, ())
    code, _, err = run(command, demo_cpu, *prompt, "--lora", tmp_path)
    assert code == 1
    assert "takes no adapters at run time; export it with --lora-slots" in err
    code, _, err = run(command, demo_slots, *prompt, "--lora", tmp_path)
    assert code == 1
    assert "has no adapter_config.json; give the folder of a LoRA adapter" in err
    assert "\n" not in err.removeprefix("load\n").rstrip("\n")


def validated(run, bundle, checkpoint, *options):
    code, out, err = run("validate", bundle, "--reference", checkpoint, *options, "--json")
    assert out, err
    return code, json.loads(out)


@pytest.mark.parametrize(("target", "precision"), [("cpu", "int8"), ("ort", "fp16"), ("native", "fp32")])
def test_validate_compares_with_the_merged_checkpoint(tmp_path, run, target, precision):
    """As near to the merged reference as a bundle into which the adapter was merged; and far without the adapter."""
    base = write_checkpoint(tmp_path / "base", tiny_config(intermediate_size=128))
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=every)
    rewrite(adapter, lambda found: {key: one for key, one in found.items() if "base_layer" not in key})
    options = ("--target", target, "--precision", precision, "--no-parity")
    assert run("export", base, tmp_path / "slots", *options, "--lora-slots", 1)[0] == 0
    assert run("export", base, tmp_path / "merged", *options, "--lora", adapter)[0] == 0
    text = tmp_path / "text.ids"
    text.write_text("\n".join(" ".join(map(str, range(start, start + 40))) for start in (5, 60, 111)))
    asked = ("--lora", adapter, "--text", text, "--no-gate", "--layers", "--against", tmp_path / "merged")
    code, report = validated(run, tmp_path / "slots", base, *asked)
    assert code == 0
    assert "at run time" in report["bundle"]["what"]
    ours, merged = (one["metrics"]["relative_error"] for one in report["comparisons"][:2])
    assert ours < max(2 * merged, 2e-3)
    assert report["layers"]["culprit"] is None
    assert report["comparisons"][0]["greedy"] is not None
    code, _, err = run("validate", tmp_path / "slots", "--reference", base, "--lora", f"{adapter}=0.5")
    assert code == 1
    assert "was made with no adapter" in err


def test_chat(demo_slots, demo_adapters):
    """One message from a pipe, with the base model and with the adapter."""

    def answer(*options):
        command = [sys.executable, "-m", "glm4_deploy", "chat", demo_slots, "--temperature", "0", *options]
        done = subprocess.run(
            [*map(str, command), "--max-tokens", "12"],
            input="Tell me of the sea.\n",
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    plain, adapted = answer(), answer("--lora", demo_adapters["poet"])
    assert plain.strip()
    assert adapted != plain
