"""Checks the files that a bundle copies from the checkpoint, before the work."""

from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.errors import BundleError, CheckpointError


def require_tokenizer(source: Checkpoint) -> None:
    """Refuse a tokenizer that a session could not open, or that has ids beyond the model's vocabulary.

    Raises:
        CheckpointError: what is wrong with ``tokenizer.json``.
    """
    if "tokenizer.json" not in source.side_files():
        return
    from glm4_runtime.tokenizer import Tokenizer

    try:
        size = Tokenizer.from_folder(source.folder).vocab_size
    except BundleError as error:
        raise CheckpointError(f"{error}; download it again") from error
    if size > source.config.vocab_size:
        raise CheckpointError(
            f"{source.folder / 'tokenizer.json'} has the token id {size - 1}, but config.json has a vocabulary of "
            f"{source.config.vocab_size}: the two are of different models; download both again"
        )
