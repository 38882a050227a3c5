"""A user's options for an engine, and the choices that follow from the options."""

from dataclasses import dataclass

from glm4_exporters.engine.kinds import ENGINE_KINDS
from glm4_exporters.targets import PRECISIONS

ENGINE_LAYOUTS = ("shared", "split")
SMALL_TILES = "plugin-small"


@dataclass(frozen=True)
class EngineOptions:
    """A user's options for an engine. Every field except ``timing_cache`` changes the bundle.

    Attributes:
        sm: compute capabilities to build for, such as 89 for 8.9; empty for the default.
        layout: ``shared`` or ``split``, see :class:`~glm4_runtime.bundle.EngineInfo`.
        attention: ``plugin``, ``plugin-small`` (blocks with less than 48 KiB of shared memory) or ``native``; None
        for the default.
        timing_cache: a file that is read if it exists, and written after the build.
        keep_onnx: leave the graph and the weights that the engine was built from in the bundle.
    """

    sm: tuple[str, ...] = ()
    layout: str = "shared"
    attention: str | None = None
    timing_cache: str | None = None
    keep_onnx: bool = False


def engine_capabilities(
    kind_name: str, precision: str, options: EngineOptions
) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """
    Returns:
        The capabilities to pass to the builder (empty: its default), the capabilities of the engine's GPUs, and whether
        the engine also runs on later GPUs.
    """
    kind = ENGINE_KINDS[kind_name]
    if options.sm:
        chosen = tuple(sorted(set(options.sm), key=int))
        return chosen, chosen, False
    able = tuple(sm for sm in kind.default if int(sm) >= PRECISIONS[precision].capability)
    if able == kind.default:
        return (), able, bool(able)
    return able, able, False


def engine_attention(kind_name: str, task: str, options: EngineOptions) -> str:
    """The engine's attention; ``native`` for a task without a cache."""
    if options.attention == SMALL_TILES:
        return "plugin"
    return options.attention or (ENGINE_KINDS[kind_name].attention[0] if task == "causal-lm" else "native")


def plugin_phases(layout: str) -> tuple[str, ...]:
    """The phases of the plugin's kernels: one kernel for both profiles, or one each."""
    return ("prefill", "decode") if layout == "split" else ("shared",)
