"""llama.cpp's logits and bits per weight for a checkpoint, for ``accuracy.py``; runs in an environment of its own.

    python -m venv peer && peer/bin/pip install llama-cpp-python gguf
    peer/bin/python benchmarks/llama_cpp_peer.py INPUT OUTPUT Q4_K_M Q8_0

INPUT holds ``config.json``, ``tensors.npz`` (float32, by canonical name) and ``windows.npy`` (int32
[windows, tokens], -1 past a window's end). Written to OUTPUT: per format ``FORMAT.npy``, float32
[tokens, vocab], windows after one another, and ``peer.json``. "F32" is always measured.
"""

import argparse
import ctypes
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[Any]
Tensor = tuple[
    str, Weights, gguf.GGMLQuantizationType
]  # our name, the bytes, the type that they are stored in

ARCHITECTURE = "glm4"
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(canonical: str) -> str:
    """Our name of a tensor -> llama.cpp's."""
    if canonical in OUTER:
        return OUTER[canonical]
    _, _, layer, *middle, kind = canonical.split(".")
    return f"blk.{layer}.{TENSORS['.'.join(middle)]}.{kind}"


def write_gguf(config: Mapping[str, Any], tensors: Iterable[Tensor], path: Path) -> None:
    """A checkpoint as it is, with a vocabulary that says nothing: token ids are fed as they are."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_block_count(config["layers"])
    writer.add_context_length(config["positions"])
    writer.add_embedding_length(config["hidden"])
    writer.add_feed_forward_length(config["intermediate"])
    writer.add_head_count(config["heads"])
    writer.add_head_count_kv(config["kv_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["rotated"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["eps"])
    writer.add_vocab_size(config["vocab"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(config["vocab"])])
    writer.add_token_scores([0.0] * config["vocab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab"])
    for name, array, kind in tensors:
        writer.add_tensor(gguf_name(name), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_tensors(path: Path) -> Iterator[Tensor]:
    with np.load(path) as tensors:
        for name in tensors.files:
            yield name, tensors[name], gguf.GGMLQuantizationType.F32


def quantize(source: Path, target: Path, kind: str, *, pure: bool = False) -> None:
    """llama.cpp's own quantization, without an importance matrix; ``pure``: every matrix in the one type."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.pure = pure
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize to {kind}")


def describe(path: Path) -> dict[str, object]:
    """Bits per weight over all matrices, and which types they have."""
    bits = elements = 0
    types: dict[str, int] = defaultdict(int)
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            bits += 8 * int(tensor.n_bytes)
            elements += int(tensor.n_elements)
            types[tensor.tensor_type.name] += int(tensor.n_elements)
    return {"bits_per_weight": bits / elements, "types": {k: v / elements for k, v in types.items()}}


def logits(path: Path, windows: list[list[int]], vocab: int) -> Iterator[np.ndarray]:
    longest = max(map(len, windows))
    model = llama_cpp.Llama(
        str(path),
        n_ctx=longest,
        n_batch=longest,
        n_ubatch=longest,
        logits_all=True,
        verbose=False,
        type_k=gguf.GGMLQuantizationType.F32,
        type_v=gguf.GGMLQuantizationType.F32,  # as ours
    )
    for window in windows:
        model.reset()
        model.eval(window)
        yield model.scores[: len(window), :vocab].copy()
    model.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure llama.cpp's formats of a checkpoint.")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="such as Q4_K_M, Q8_0")
    arguments = parser.parse_args()
    config = json.loads((arguments.input / "config.json").read_text())
    vocab = config["vocab"]
    windows = [[int(i) for i in row if i >= 0] for row in np.load(arguments.input / "windows.npy")]
    full = arguments.output / "F32.gguf"
    write_gguf(config, stored_tensors(arguments.input / "tensors.npz"), full)
    report = {}
    for kind in ("F32", *arguments.formats):
        path = arguments.output / f"{kind}.gguf"
        if path != full:
            quantize(full, path, kind)
        np.save(arguments.output / f"{kind}.npy", np.concatenate(list(logits(path, windows, vocab))))
        report[kind] = describe(path)
    versions = {"llama-cpp-python": llama_cpp.__version__}
    (arguments.output / "peer.json").write_text(json.dumps({"formats": report, "versions": versions}))


if __name__ == "__main__":
    main()
