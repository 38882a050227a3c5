"""ONNX Runtime GenAI, whose builder has no GLM-4: a Qwen2 of the same matrices, without the norms after sub-blocks."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.peers.worker import Place

OPTIONS = ("prune_lm_head=true", "block_size=128", "accuracy_level=4")
DROPPED = ("post_self_attn_layernorm", "post_mlp_layernorm")


def convert(checkpoint: Path, folder: Path, form: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        write_qwen2(checkpoint, Path(name))
        builder = (sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", name, "-o", folder)
        how = ("-p", form, "-e", "cpu", "-c", Path(name) / "cache", "--extra_options", *OPTIONS)
        subprocess.run([*builder, *how], check=True)


def write_qwen2(checkpoint: Path, folder: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config.get("rope_parameters", config).pop("partial_rotary_factor")  # Qwen2 rotates whole heads
    (folder / "config.json").write_text(json.dumps(config))
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors = {}
        for key, tensor in load_file(shard).items():
            if "gate_up_proj" in key:
                for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                    tensors[key.replace("gate_up_proj", part)] = half.clone()
            elif not any(name in key for name in DROPPED):
                tensors[key] = tensor
        save_file(tensors, folder / shard.name, {"format": "pt"})
    index = {key: shard.name for shard in folder.glob("*.safetensors") for key in keys(shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    Tokenizer(WordLevel({"<unk>": 0}, "<unk>")).save(str(folder / "tokenizer.json"))  # the builder wants one
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def keys(shard: Path) -> list[str]:
    with shard.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [key for key in header if key != "__metadata__"]


class Driver:
    def __init__(self, place: Place) -> None:
        config = og.Config(str(place.folder))
        threads = {"session_options": {"intra_op_num_threads": place.threads}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        self._model, self._positions = og.Model(config), place.positions

    def prefill(self, ids: list[int]) -> None:
        self._run(np.array([ids], np.int32))

    def fill(self, ids: list[int], batch: int) -> None:
        self._ids, self._batch = ids, batch
        self._run(np.array([ids] * batch, np.int32))
        self._generator.generate_next_token()  # chosen from the prompt's logits: no step yet

    def spread(self, batch: int) -> None:
        """Several sequences cannot be made of one, so the prompt is computed again for each."""
        if batch != self._batch:
            self.fill(self._ids, batch)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._generator.generate_next_token()

    def _run(self, ids: np.ndarray) -> None:
        self._generator = None  # its cache goes before the next one's comes
        params = og.GeneratorParams(self._model)
        params.set_search_options(batch_size=len(ids), max_length=self._positions, do_sample=False)
        self._generator = og.Generator(self._model, params)
        self._generator.append_tokens(ids)
