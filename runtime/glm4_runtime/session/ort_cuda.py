"""ONNX Runtime's CUDA provider: its libraries, what it is told, and what it shares with the session."""

import contextlib
import io
from typing import Any

import numpy as np

from glm4_runtime.bundle import Manifest
from glm4_runtime.session.base import Logits
from glm4_runtime.session.cuda_device import Cuda

NO_GPU = "ask for CPUExecutionProvider, or open the bundle on a GPU host"
INT4_PRODUCTS = "ep.cuda.fpa_intb_gemm"


def preload_cuda(ort: Any) -> str:
    """Load NVIDIA's libraries from their packages, for hosts that have a driver and nothing else of CUDA.

    Returns:
        What did not load, in one line, as ONNX Runtime tells it; empty where all is there.
    """
    if not hasattr(ort, "preload_dlls"):  # onnxruntime before 1.21
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints
        ort.preload_dlls()
    return " ".join(said.getvalue().split())


class OrtCuda:
    """One session's share of a GPU.

    Attributes:
        cuda: its stream is the provider's too, so that runs and moves of the cache keep their order.
        missing: libraries that did not load, in one line.
    """

    def __init__(self, ort: Any) -> None:
        self.missing = preload_cuda(ort)
        self.cuda = Cuda("cuda", NO_GPU)
        self._pinned: Logits | None = None

    def provider_options(self) -> dict[str, str]:
        """Options of the provider.

        The cache is allocated by us and the rest is of few sizes, so an arena that doubles would only keep memory.
        """
        return {"user_compute_stream": str(self.cuda.stream), "arena_extend_strategy": "kSameAsRequested"}

    @staticmethod
    def configuration(manifest: Manifest) -> dict[str, str]:
        """Entries of the session's configuration.

        By default ONNX Runtime widens an int4 weight to fp16 before the product of a prompt. With this entry it
        multiplies by the int4 weight itself, where the weight's blocks are of a size that it has kernels for.
        """
        narrow = manifest.precision == "int4" and manifest.activations == "float16"
        return {INT4_PRODUCTS: "1"} if narrow else {}

    def allocate_logits(self, rows: int, vocabulary: int) -> None:
        """Pin host memory for one position of each row, which the GPU then writes without a copy on the way."""
        pinned = self.cuda.allocate_pinned(4 * rows * vocabulary)
        self._pinned = pinned.view(np.float32).reshape(rows, 1, vocabulary)

    def new_logits(self, shape: tuple[int, int, int]) -> Logits:
        """Host memory for a run's logits; that of a decode step is pinned and the next one's as well."""
        if self._pinned is not None and shape[1] == 1:
            return self._pinned[: shape[0]]
        return np.empty(shape, np.float32)

    def close(self) -> None:
        self._pinned = None
        self.cuda.close()
