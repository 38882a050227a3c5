"""What the machine gives at the time: bytes read from memory, and products of 8-bit integers."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

READ_BYTES = 1 << 30
ROWS, INNER, COLUMNS = 512, 4096, 27392  # a prompt of 512 through gate_up of the 9B


class Ceilings:
    def __init__(self, threads: int) -> None:
        self._parts = np.array_split(np.ones(READ_BYTES // 8, np.uint64), threads)
        self._pool = ThreadPoolExecutor(threads)
        self._product = integer_product(threads)
        draw = np.random.default_rng(0)
        self._rows = draw.integers(0, 256, (ROWS, INNER)).astype(np.uint8)

    def bandwidth(self) -> float:
        """GB/s, the best of three readings."""
        return READ_BYTES / min(self._seconds(self._read) for _ in range(3)) / 1e9

    def integer_gemm(self) -> float:
        """Gop/s, two for each multiply-add, the best of three."""
        return 2e-9 * ROWS * INNER * COLUMNS / min(self._seconds(self._multiply) for _ in range(3))

    def _read(self) -> None:
        list(self._pool.map(np.bitwise_or.reduce, self._parts))

    def _multiply(self) -> None:
        self._product.run(None, {"rows": self._rows})

    @staticmethod
    def _seconds(call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def integer_product(threads: int) -> onnxruntime.InferenceSession:
    """uint8 rows by int8 columns, the zero points as a quantized model has them."""
    columns = np.random.default_rng(1).integers(-127, 128, (INNER, COLUMNS)).astype(np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["rows", "columns", "zero"], ["sums"])],
        "ceiling",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, (ROWS, INNER))],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, (ROWS, COLUMNS))],
        [
            onnx.numpy_helper.from_array(columns, "columns"),
            onnx.numpy_helper.from_array(np.uint8(128), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle while a contender runs
    return onnxruntime.InferenceSession(model.SerializeToString(), options)
