"""llama.cpp: the same checkpoint as GGUF, in its own formats, through its C interface."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from benchmarks.llama_cpp_peer import Weights, quantize, write_gguf
from benchmarks.peers.worker import Place

# A pure format has the head and the embeddings too; llama.cpp's own mix gives these more bits.
FORMATS = {"q8_0": ("Q8_0", False), "q4_0": ("Q4_0", True), "q4_k_m": ("Q4_K_M", False), "bf16": None}
BATCH, CHUNK = 2048, 512


def convert(checkpoint: Path, folder: Path, form: str) -> None:
    target = folder / "model.gguf"
    plain = target if FORMATS[form] is None else folder / "bf16.gguf"
    write_gguf(description(checkpoint), tensors(checkpoint), plain)
    if FORMATS[form] is not None:
        kind, pure = FORMATS[form]
        quantize(plain, target, kind, pure=pure)
        plain.unlink()


def description(checkpoint: Path) -> dict[str, int | float]:
    config = json.loads((checkpoint / "config.json").read_text())
    rope = config.get("rope_parameters", config)
    return {
        "layers": config["num_hidden_layers"],
        "positions": config["max_position_embeddings"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "rotated": int(config["head_dim"] * rope["partial_rotary_factor"]),
        "rope_theta": rope["rope_theta"],
        "eps": config["rms_norm_eps"],
        "vocab": config["vocab_size"],
    }


def tensors(checkpoint: Path) -> Iterator[tuple[str, Weights, gguf.GGMLQuantizationType]]:
    """Matrices in bf16 as they are mapped; vectors widened to float32, as llama.cpp demands."""
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with shard.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, _ = entry["data_offsets"]
            bits = np.memmap(shard, np.uint16, "r", 8 + size + start, tuple(entry["shape"]))
            if bits.ndim == 1:
                yield name, (bits.astype(np.uint32) << 16).view(np.float32), gguf.GGMLQuantizationType.F32
            else:
                yield name, bits.view(np.uint8), gguf.GGMLQuantizationType.BF16


class Driver:
    def __init__(self, place: Place) -> None:
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        path = str(place.folder / "model.gguf").encode()
        model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = place.slots * place.positions, place.slots
        params.n_batch, params.n_ubatch = BATCH, CHUNK
        params.n_threads = params.n_threads_batch = place.threads
        if place.setting == "kv8":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_Q8_0
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def prefill(self, ids: list[int]) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            last = len(ids) - start - 1
            self._run([(token, start + i, 0, i == last) for i, token in enumerate(part)])
        self._length, self._tokens = len(ids), [self._choose(last)]

    def fill(self, ids: list[int], batch: int) -> None:
        self.prefill(ids)
        self.spread(batch)

    def spread(self, batch: int) -> None:
        for row in range(1, batch):
            llama_cpp.llama_memory_seq_cp(self._memory, 0, row, -1, -1)
        self._tokens = self._tokens[:1] * batch

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._run([(token, self._length, row, True) for row, token in enumerate(self._tokens)])
            self._length += 1
            self._tokens = [self._choose(row) for row in range(len(self._tokens))]

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Token, position, sequence, and whether its logits are asked for."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, asked) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, asked
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")

    def _choose(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())
