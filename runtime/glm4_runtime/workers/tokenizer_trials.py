"""The worker that tries whether the library reads a ``tokenizer.json``: some files end the process that reads them.

A task is the path of a file, each of its bytes as one character. The answer is what is wrong with the file, or null.
"""

import os
from pathlib import Path

import tokenizers

from glm4_runtime.workers import child

_LONGEST_REASON = 300


def main(limits: str) -> None:
    child.answer_tasks(trial, limits)


def trial(path: str) -> str | None:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(Path(os.fsdecode(path.encode("latin-1"))).read_bytes())
        tokenizer.encode("a text, 1 你好\n")
    except MemoryError:
        raise
    except Exception as error:  # the library raises no narrower exception
        return str(error)[:_LONGEST_REASON]
    return None
