"""Local tasks of lm-evaluation-harness, one for each kind of request."""

import json
from pathlib import Path

DOCUMENTS = {
    "choices": [
        {"question": "And it came to", "choices": [" pass", " the sea", " an end of all things"], "label": 0},
        {"question": "In the beginning ", "choices": ["was", "there were", "he said unto them"], "label": 1},
        {"question": "The king said", "choices": [" unto", " that", ", Behold"], "label": 2},
        {"question": "他说：", "choices": ["你好", " no", "是"], "label": 0},
    ],
    "empty": [{"question": "", "choices": ["And", " the", "of"], "label": 0}],
    "texts": [
        {"text": "And it came to pass in those days. " * 8},
        {"text": "Short."},
    ],
    "long": [{"text": "天地玄黄 " * 90}],  # more than the demo reads at once
    "answers": [
        {"question": "And it came to pass", "answer": "x"},
        {"question": "Who are you?", "answer": "y"},
        {"question": "In the beginning", "answer": "z"},
    ],
}
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
TEXTS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
TASKS = {
    "choices": CHOICES,
    "empty": CHOICES,  # a question without a context
    "texts": TEXTS,
    "long": TEXTS,
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """The tasks as files for ``--include_path``."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    for name, options in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS[name]), "utf-8")
        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **options,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), "utf-8")
    return folder
