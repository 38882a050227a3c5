"""Compares with the original of a quantized checkpoint too: the model before another tool quantized it.

original -> reference    the loss of the tool's quantization
reference -> bundle      the loss of the export
original -> bundle       both together
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm4_deploy.validate.comparison import Comparison
from glm4_exporters.architecture import expected_tensors
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle import Manifest
from glm4_runtime.errors import RequestError

ORIGINAL, REFERENCE, BUNDLE = "original", "reference", "bundle"
# The metric that measures a loss, by task.
LOSS = {"causal-lm": "kl_mean"}
OTHER_LOSS = "relative_error"


def open_original(
    path: Path, reference: Checkpoint, adapters: Sequence[tuple[str, float]] = ()
) -> Checkpoint:
    """Open the original of a quantized checkpoint.

    Args:
        adapters: the reference's, so that their effect is no loss.

    Raises:
        RequestError: the reference is not quantized, the original is, or they are different models.
    """
    if reference.source is None:
        raise RequestError(
            f"{path} is a checkpoint, not a bundle; --against takes one only if the reference is quantized, and "
            f"{reference.folder} is not. Give a bundle"
        )
    original = Checkpoint.load(path, reference.task, adapters)
    wrong = None
    if original.source is not None:
        wrong = "is quantized too"
    elif _model_of(original) != _model_of(reference):
        wrong = f"is another model than {reference.folder}"
    if wrong is not None:
        original.close()
        raise RequestError(f"{path} {wrong}; give --against the checkpoint before its quantization")
    return original


def _model_of(checkpoint: Checkpoint) -> tuple[object, ...]:
    """The facts that both checkpoints of one model have in common."""
    config = checkpoint.config
    return expected_tensors(config, checkpoint.task), config.rope, config.rms_norm_eps, config.head_dim


def original_comparisons(manifest: Manifest, row: str) -> list[Comparison]:
    """The comparisons of the reference and of the bundle with the original.

    Args:
        row: the gate's row for the bundle.
    """
    task = manifest.task
    return [
        Comparison(ORIGINAL, REFERENCE, row, task, "float32"),
        Comparison(ORIGINAL, BUNDLE, row, task, manifest.activations),
    ]


def losses(comparisons: list[Comparison]) -> dict[str, Any]:
    """Whose loss is whose, from the summarized comparisons: one metric, measured three times."""
    found = {(one.expected, one.actual): one for one in comparisons}
    task = comparisons[0].task
    metric = LOSS.get(task, OTHER_LOSS)
    values = {
        "quantization": found[ORIGINAL, REFERENCE].metrics[metric],
        "export": found[REFERENCE, BUNDLE].metrics[metric],
        "both": found[ORIGINAL, BUNDLE].metrics[metric],
    }
    return {"metric": metric, **values}


def losses_line(found: dict[str, Any]) -> str:
    """One line for the terminal, the larger loss first."""
    larger, smaller = sorted(("quantization", "export"), key=lambda name: -found[name])
    what = {"quantization": "the quantization of the checkpoint", "export": "the export"}
    return (
        f"{found['metric']}: {what[larger]} loses {found[larger]:.2e}, {what[smaller]} {found[smaller]:.2e}; "
        f"both together {found['both']:.2e}"
    )
