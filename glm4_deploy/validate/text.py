"""The text that a comparison reads: a user's, the bundled corpus, or random ids where there is no tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from glm4_deploy.texts import prefix_of, random_sequences, read_sequences
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.errors import TextError
from glm4_runtime.tokenizer import TOKENIZER, Tokenizer

CORPUS = "corpus.jsonl"


@dataclass(frozen=True)
class Text:
    """Sequences of token ids, and where they are from.

    Attributes:
        prefix: so many tokens at the start of each sequence are the tokenizer's, and not predicted.
    """

    sequences: Sequence[Sequence[int]]
    source: str
    tokenizer: Tokenizer | None
    prefix: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


def choose_text(checkpoint: Checkpoint, path: Path | None, length: int, max_tokens: int) -> Text:
    """At most ``max_tokens`` tokens, in sequences of at most ``length``.

    Raises:
        TextError: the file cannot be read as text or token ids of this model.
    """
    has_tokenizer = (checkpoint.folder / TOKENIZER).is_file()
    tokenizer = Tokenizer.from_folder(checkpoint.folder) if has_tokenizer else None
    vocab = checkpoint.config.vocab_size
    # Documents end where they end: there are more sequences than full ones would be.
    limit = max_tokens // 2
    found: list[list[int]] = []
    if path is not None:
        found, source = read_sequences(path, tokenizer, length, limit, vocab), str(path)
        is_text = path.suffix != ".ids"
    elif tokenizer is not None:
        with as_file(files(__package__).joinpath(CORPUS)) as corpus:
            found = read_sequences(corpus, tokenizer, length, limit)
        found = [ids for ids in found if max(ids) < vocab]  # a tokenizer may be wider than a cut-down model
        source, is_text = "the bundled corpus", True
    if not found:
        found = random_sequences(vocab, length, -(-max_tokens // length))
        source = f"random token ids, since {checkpoint.folder} has no {TOKENIZER} of its vocabulary"
        is_text = False
    prefix = len(prefix_of(tokenizer)) if is_text and _all_begin_with(found, prefix_of(tokenizer)) else 0
    sequences = _first_tokens(found, max_tokens)
    if not any(len(ids) > prefix + 1 for ids in sequences):
        raise TextError(f"{max_tokens} tokens of {source} leave nothing to predict; allow more")
    return Text(sequences, source, tokenizer, prefix)


def _all_begin_with(sequences: Sequence[Sequence[int]], prefix: Sequence[int]) -> bool:
    return all(list(ids[: len(prefix)]) == list(prefix) for ids in sequences)


def _first_tokens(sequences: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    kept: list[Sequence[int]] = []
    for ids in sequences:
        if count < 2:
            break
        kept.append(ids[:count])
        count -= len(ids)
    return kept
