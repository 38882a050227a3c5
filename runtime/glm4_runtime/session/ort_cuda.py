"""ONNX Runtime's CUDA provider: its libraries, its options, and the stream that it shares with the session."""

import contextlib
import io
from typing import Any

import numpy as np

from glm4_runtime.bundle import Manifest
from glm4_runtime.session.base import Logits
from glm4_runtime.session.cuda_device import Cuda

WITHOUT_CUDA = "ask for CPUExecutionProvider, or open the bundle on a GPU host"
INT4_PRODUCTS = "ep.cuda.fpa_intb_gemm"


def preload_cuda(ort: Any) -> str:
    """Load NVIDIA's libraries from their Python packages, for hosts that have only the driver.

    Returns:
        ONNX Runtime's message about libraries that did not load, in one line; empty if all loaded.
    """
    if not hasattr(ort, "preload_dlls"):  # onnxruntime before 1.21
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints
        ort.preload_dlls()
    return " ".join(said.getvalue().split())


class OrtCuda:
    """The GPU resources of one session.

    Attributes:
        cuda: the provider uses its stream too, so that runs and moves of the cache stay in order.
        missing: libraries that did not load, in one line.
    """

    def __init__(self, ort: Any) -> None:
        self.missing = preload_cuda(ort)
        self.cuda = Cuda("cuda", WITHOUT_CUDA)
        self._pinned: Logits | None = None

    def provider_options(self) -> dict[str, str]:
        """Options of the provider.

        We allocate the cache, and all other allocations have few sizes. So an arena that doubles would only waste
        memory.
        """
        return {"user_compute_stream": str(self.cuda.stream), "arena_extend_strategy": "kSameAsRequested"}

    @staticmethod
    def configuration(manifest: Manifest) -> dict[str, str]:
        """Entries of the session's configuration.

        By default ONNX Runtime widens an int4 weight to fp16 before the product of a prompt. With this entry it
        multiplies by the int4 weight directly, if it has kernels for the block size.
        """
        narrow = manifest.precision == "int4" and manifest.activations == "float16"
        return {INT4_PRODUCTS: "1"} if narrow else {}

    def allocate_logits(self, rows: int, vocabulary: int) -> None:
        """Pin host memory for one position of each row, so that the GPU writes logits directly."""
        pinned = self.cuda.allocate_pinned(4 * rows * vocabulary)
        self._pinned = pinned.view(np.float32).reshape(rows, 1, vocabulary)

    def new_logits(self, shape: tuple[int, int, int]) -> Logits:
        """Host memory for a run's logits. For a decode step it is pinned, and the next step uses it again."""
        if self._pinned is not None and shape[1] == 1:
            return self._pinned[: shape[0]]
        return np.empty(shape, np.float32)

    def close(self) -> None:
        self._pinned = None
        self.cuda.close()
