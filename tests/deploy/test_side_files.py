"""Files beside the weights are held against the configuration before the work."""

import json
import shutil
from pathlib import Path

import pytest

from glm4_deploy import pipeline
from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime.errors import CheckpointError

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"


def beyond(text):
    tokenizer = json.loads(text)
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 9999, "content": "<|beyond|>"})
    return json.dumps(tokenizer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[: len(text) // 2], "is not a tokenizer that can be read: .*; download it again"),
        (lambda _: "{}", "is not a tokenizer that can be read"),
        (
            beyond,
            "has the token id .*, but config.json has a vocabulary of 2048: the two are of different models",
        ),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_before_the_work(tmp_path, monkeypatch, change, reason):
    checkpoint = shutil.copytree(DEMO, tmp_path / "checkpoint")
    path = checkpoint / "tokenizer.json"
    path.write_text(change(path.read_text("utf-8")), "utf-8")
    monkeypatch.setattr(pipeline, "_trace", lambda *_: pytest.fail("the work began"))
    with pytest.raises(CheckpointError, match=reason):
        export(checkpoint, tmp_path / "bundle", ExportOptions(parity=False))
    assert not (tmp_path / "bundle").exists()
