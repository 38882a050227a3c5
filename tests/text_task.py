"""A task of lm-evaluation-harness that the demo checkpoint can do: continue held-out text."""

import json
from pathlib import Path

TEXT = Path(__file__).parents[1] / "demo" / "heldout.txt"
CONTEXT, CONTINUATION = 300, 60  # characters


def write_text_task(folder, items):
    """Write task.yaml with its data; items are windows of the held-out text, side by side."""
    text = TEXT.read_text("utf-8")
    step = (len(text) - CONTEXT - CONTINUATION) // items
    docs = (
        {"before": text[at : at + CONTEXT], "after": text[at + CONTEXT : at + CONTEXT + CONTINUATION]}
        for at in range(0, items * step, step)
    )
    data = folder / "text.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), "utf-8")
    (folder / "text.yaml").write_text(
        f"""task: held_out_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{before}}}}"
doc_to_target: "{{{{after}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
        "utf-8",
    )
    return folder / "text.yaml"
