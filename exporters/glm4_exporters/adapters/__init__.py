"""LoRA adapters, merged into a checkpoint's weights while they are read."""

from glm4_exporters.adapters.adapter import Adapter, Merged, merge

__all__ = ["Adapter", "Merged", "merge"]
