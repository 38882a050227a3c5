"""OpenVINO: optimum-intel's export of the same checkpoint, and the runtime driven directly."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

from benchmarks.peers.worker import Place

WEIGHTS = {
    "int8": ("int8",),
    "int4": ("int4", "--sym", "--group-size", "128", "--ratio", "1.0"),
    "int4-head": ("int4", "--sym", "--group-size", "128", "--ratio", "1.0", "--all-layers"),
}
SETTINGS = {
    "": {},
    "f32": {"INFERENCE_PRECISION_HINT": "f32"},
    # Inputs stay float32, too. With --cap avx2 nothing else runs: for quantized inputs OpenVINO asks oneDNN for products
    # of the processor's own instruction set, which oneDNN refuses under a cap.
    "f32-inputs": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
}


def convert(checkpoint: Path, folder: Path, form: str) -> None:
    command = Path(sys.executable).with_name("optimum-cli")
    what = ("--model", checkpoint, "--task", "text-generation-with-past", "--weight-format", *WEIGHTS[form])
    subprocess.run([command, "export", "openvino", *what, folder], check=True)


def ask_for_the_last_position(model: ov.Model) -> None:
    """The export computes the head for every position of a prompt; nobody asks for that."""
    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last, one = np.array([-1]), np.array([1])
    sliced = ops.slice(head.input_value(0), last, np.array([np.iinfo(np.int64).max]), one, axes=one)
    head.input(0).replace_source_output(sliced.output(0))
    model.validate_nodes_and_infer_types()


class Driver:
    def __init__(self, place: Place) -> None:
        core = ov.Core()
        model = core.read_model(place.folder / "openvino_model.xml")
        ask_for_the_last_position(model)
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": place.threads}
        compiled = core.compile_model(model, "CPU", options | SETTINGS[place.setting])
        self._request = compiled.create_infer_request()

    def prefill(self, ids: list[int]) -> None:
        self._request.reset_state()
        self._length = 0
        self._step(np.array([ids]), np.zeros(1, np.int32))

    def fill(self, ids: list[int], batch: int) -> None:
        self.prefill(ids)
        self.spread(batch)

    def spread(self, batch: int) -> None:
        # the next step takes the first sequence's cache for each of its rows
        self._tokens = np.repeat(self._tokens[:1], batch, 0)
        self._step(self._tokens, np.zeros(batch, np.int32))

    def decode(self, steps: int) -> None:
        rows = np.arange(len(self._tokens), dtype=np.int32)
        for _ in range(steps):
            self._step(self._tokens, rows)

    def _step(self, ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int32]) -> None:
        batch, width = ids.shape
        places = np.arange(self._length, self._length + width)
        self._length += width
        logits = self._request.infer(
            {
                "input_ids": ids,
                "attention_mask": np.ones((batch, self._length), np.int64),
                "position_ids": np.broadcast_to(places, (batch, width)),
                "beam_idx": rows,
            },
            share_inputs=True,
            share_outputs=True,
        )["logits"]
        self._tokens = logits[:, -1:].argmax(-1)
