"""Decides the stages of a model: how many layers each has. :mod:`stage_cut` makes their graphs."""

from collections.abc import Sequence
from dataclasses import replace

from glm4_exporters.architecture import EMBEDDING, expected_tensors
from glm4_exporters.config import Glm4Config
from glm4_runtime.bundle import EngineProfile
from glm4_runtime.bundle.file_names import ENGINE, STAGE_ENGINE, STAGE_GRAPH, STAGE_WEIGHTS
from glm4_runtime.bundle.manifest import StageInfo
from glm4_runtime.errors import ExportError, shown


def stage_list(config: Glm4Config, task: str, asked: Sequence[int]) -> tuple[StageInfo, ...]:
    """The stages that a user asks for; empty for none.

    Args:
        asked: one number, the count of stages; or the count of layers of each stage.

    Raises:
        ExportError: the numbers do not fit the model.
    """
    if not asked:
        return ()
    layers, said = config.num_hidden_layers, ",".join(map(str, asked))
    if layers < 2:
        raise ExportError(
            "--stages needs a model of at least 2 layers, but this model has 1; leave --stages out"
        )
    if len(asked) > 1:
        if min(asked) < 1 or sum(asked) != layers:
            raise ExportError(
                f"--stages {shown(said)} has {sum(asked)} layers, but this model has {layers}; give counts of at least "
                f"1 with the sum {layers}"
            )
        return _stages(asked)
    if not 2 <= asked[0] <= layers:
        raise ExportError(
            f"--stages is {said}, but this model of {layers} layers has 2 ... {layers} stages; leave --stages out for one"
        )
    return _stages(_balanced(config, task, asked[0]))


def stage_shapes(config: Glm4Config, task: str, stage: StageInfo) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a stage reads, by canonical name."""
    first, end = stage.first_layer, stage.first_layer + stage.layers
    tied_head = end == config.num_hidden_layers and config.tie_word_embeddings

    def is_read(name: str) -> bool:
        if name.startswith("model.layers."):
            return first <= int(name.split(".")[2]) < end
        return first == 0 or tied_head if name == EMBEDDING else end == config.num_hidden_layers

    return {name: shape for name, shape in expected_tensors(config, task).items() if is_read(name)}


def stage_profiles(profiles: Sequence[EngineProfile], number: int) -> tuple[EngineProfile, ...]:
    """The profiles of an engine for the stage ``number``, counted from 1, with its own file names."""
    suffix = ENGINE.partition(".")[2]
    names = {p.file: STAGE_ENGINE.format(number, suffix if p.file == ENGINE else p.file) for p in profiles}
    return tuple(replace(profile, file=names[profile.file]) for profile in profiles)


def _balanced(config: Glm4Config, task: str, count: int) -> list[int]:
    """Counts of layers by which the stages have about the same number of weights. The first stage has the embedding
    too, and the last one the head."""
    shapes = expected_tensors(config, task)
    sizes = {name: shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    layers, table = config.num_hidden_layers, sizes[EMBEDDING] / layer  # in layers
    share = (layers + 2 * table) / count
    ends = [0]
    for number in range(1, count):
        end = round(number * share - table)
        ends.append(min(max(end, ends[-1] + 1), layers - (count - number)))
    return [end - start for start, end in zip(ends, [*ends[1:], layers], strict=True)]


def _stages(counts: Sequence[int]) -> tuple[StageInfo, ...]:
    return tuple(
        StageInfo(sum(counts[:i]), count, STAGE_GRAPH.format(i + 1), STAGE_WEIGHTS.format(i + 1))
        for i, count in enumerate(counts)
    )
