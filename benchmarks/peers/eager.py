"""transformers, eagerly on PyTorch: reads the checkpoint as it is."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.worker import Place

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def convert(checkpoint: Path, folder: Path, form: str) -> None:  # noqa: ARG001  one type of checkpoint serves all
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file.resolve())


class Driver:
    def __init__(self, place: Place) -> None:
        torch.set_num_threads(place.threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(place.folder, dtype=TYPES[place.format]).eval()

    def prefill(self, ids: list[int]) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._step(torch.tensor([ids]))

    def fill(self, ids: list[int], batch: int) -> None:
        self.prefill(ids)
        self._cache.batch_repeat_interleave(batch)
        self._tokens = self._tokens.expand(batch, 1)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._step(self._tokens)

    def _step(self, ids: torch.Tensor) -> None:
        logits = self._model(ids, past_key_values=self._cache, logits_to_keep=1).logits
        self._tokens = logits.argmax(-1)
