"""Whether a checkpoint's tensors are the weights of its configuration, with the likely cause of a mismatch."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from glm4_exporters.architecture import BACKBONE, HEAD, SCORES
from glm4_exporters.config import DTYPES, Glm4Config
from glm4_runtime.bundle.file_names import CONFIG
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError, some

HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # a buffer saved by old releases, and not needed

# Likely causes of a mismatch: kind of mismatch, pattern of the tensor's name, cause. The first matching row is reported.
CAUSES = [
    (
        "surplus",
        r"(scale|scales|qweight|qzeros|weight_scale_inv|absmax|weight_packed)$",
        "the checkpoint is quantized, but config.json has no quantization_config that says how, or another one; "
        "copy config.json from the tool's output",
    ),
    (
        "surplus",
        r"lora_|modules_to_save|original_module|\.base_layer\.",
        "an adapter is not merged into the weights; merge it (merge_and_unload) and save that",
    ),
    (
        "surplus",
        r"mlp\.(gate|up)_proj",
        "gate and up are apart, so this is another architecture's checkpoint",
    ),
    ("surplus", r"mlp\.experts", "this is a mixture of experts, glm4_moe"),
    ("surplus layer", r"", "num_hidden_layers in config.json is smaller than the weights'"),
    ("surplus", r"[qkv]_proj\.bias", "attention_bias in config.json is false, but the weights have biases"),
    ("misshapen", r"[kv]_proj", "num_key_value_heads or head_dim in config.json is not the weights'"),
    ("misshapen", r"embed_tokens|lm_head", "vocab_size or hidden_size in config.json is not the weights'"),
    ("misshapen", r"mlp\.", "intermediate_size or hidden_size in config.json is not the weights'"),
    ("misshapen", r"score", "id2label in config.json does not name the labels of the weights"),
    (
        "missing",
        r"layers\.\d+\.(?!.*bias)",
        "num_hidden_layers in config.json is larger than the weights', or a file is not whole",
    ),
    ("missing", r"[qkv]_proj\.bias", "attention_bias in config.json is true, but the weights have no biases"),
    ("missing", r"score", "the checkpoint was not trained for this task"),
    ("missing", r"lm_head", "the embeddings are tied (then say tie_word_embeddings), or this is an encoder"),
    ("wrong dtype", r"", "the checkpoint is quantized; save it in bfloat16, float16 or float32"),
]


def require_tensors(
    folder: Path,
    config: Glm4Config,
    task: str,
    headers: Mapping[str, TensorHeader],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse a checkpoint whose tensors are not the task's weights.

    Args:
        headers: the tensors found, by the checkpoint's names.
        expected: shapes of the task's weights, by the checkpoint's names.

    Raises:
        CheckpointError: one error that lists all mismatches of names, shapes and types, and the likely cause.
    """
    wanted = dict(expected)
    if task == "causal-lm" and config.tie_word_embeddings and HEAD in headers:
        wanted[HEAD] = (config.vocab_size, config.hidden_size)  # a tied head that is stored too
    mismatches = _mismatches(headers, wanted, ignored=SCORES | {HEAD} if task == "encoder" else frozenset())
    found = [f"{len(names)} {what} ({some(names.values())})" for what, names in mismatches.items() if names]
    if found:
        cause = _likely_cause(mismatches, headers, config.num_hidden_layers)
        likely = "" if cause is None else f"; likely cause: {cause}"
        raise CheckpointError(
            f"the weights in {folder} are not the {task} model of its {CONFIG}: {'; '.join(found)}{likely}"
        )
    tied = headers.get(HEAD) if HEAD in wanted and HEAD not in expected else None
    if tied is not None and tied.dtype != headers[next(iter(expected))].dtype:
        raise CheckpointError(
            f"{tied.file} holds a tied {HEAD} in {tied.dtype}, which is not the embedding's type"
        )


def _mismatches(
    headers: Mapping[str, TensorHeader], wanted: Mapping[str, tuple[int, ...]], ignored: Collection[str]
) -> dict[str, dict[str, str]]:
    """By kind of mismatch: the tensors' names, each with the text that describes the tensor in the error."""
    surplus = [name for name in headers if not (name in wanted or name in ignored or HARMLESS.search(name))]
    present = {name: headers[name] for name in wanted if name in headers}
    return {
        "missing": {name: name for name in wanted if name not in headers},
        "surplus": {name: name for name in surplus},
        "misshapen": {
            name: f"{name} {list(header.shape)} instead of {list(wanted[name])}"
            for name, header in present.items()
            if header.shape != wanted[name]
        },
        "wrong dtype": {
            name: f"{name} {header.dtype}" for name, header in present.items() if header.dtype not in DTYPES
        },
    }


def _likely_cause(mismatches: dict[str, dict[str, str]], names: Iterable[str], layers: int) -> str | None:
    """The first cause of ``CAUSES`` that fits; a training wrapper's prefix comes first, unless an adapter is found."""
    surplus_layer = {name: name for name in mismatches["surplus"] if _layer(name) >= layers}
    found = mismatches | {"surplus layer": surplus_layer}
    causes = (
        cause for kind, pattern, cause in CAUSES if any(re.search(pattern, name) for name in found[kind])
    )
    cause, wrapper = next(causes, None), _wrapper(names)
    if wrapper and "an adapter" not in (cause or ""):
        return f"all names begin with {wrapper!r}, a training wrapper's; save the model inside it"
    return cause


def _wrapper(names: Iterable[str]) -> str:
    """The prefix of all names that a training wrapper added, such as ``module.``. Empty in a plain checkpoint."""
    names = list(names)
    place = next((name for name in names if name.endswith("embed_tokens.weight")), "")
    prefix = place.removesuffix("embed_tokens.weight").removesuffix(BACKBONE)
    return prefix[:100] if names and all(name.startswith(prefix) for name in names) else ""


def _layer(name: str) -> int:
    found = re.match(r"(model\.)?layers\.(\d+)\.", name)
    return int(found[2]) if found else -1
