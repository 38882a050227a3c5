"""LoRA adapters, merged into a checkpoint's weights while they are read."""

from glm4_exporters.adapters.adapter import Adapter, Merged, merge
from glm4_exporters.adapters.base_model import require_base

__all__ = ["Adapter", "Merged", "merge", "require_base"]
