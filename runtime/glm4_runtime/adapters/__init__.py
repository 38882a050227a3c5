"""LoRA adapters as PEFT saves them: read and checked, without torch."""

from glm4_runtime.adapters.adapter import AdapterFolder, LowRankTensors, WholeTensor
from glm4_runtime.adapters.base_model import require_base

__all__ = ["AdapterFolder", "LowRankTensors", "WholeTensor", "require_base"]
