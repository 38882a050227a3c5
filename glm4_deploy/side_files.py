"""Compares the files that a bundle copies from the checkpoint, before the work."""

from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle.file_names import CONFIG, TOKENIZER
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import BundleError, CheckpointError

FROM_ONE_REPOSITORY = "files of different models; download them again from one repository"


def compare_side_files(source: Checkpoint) -> list[str]:
    """Compare a checkpoint's side files with its configuration and with each other; returns warnings.

    Raises:
        CheckpointError: a session could not open a file, or two files cannot work together.
    """
    from glm4_runtime.chat_template import ChatTemplate, require_control_tokens
    from glm4_runtime.side_files import contradictions, read_side_files
    from glm4_runtime.tokenizer import Tokenizer

    config = source.config
    said = {
        "model_file": CONFIG,
        "vocab_size": config.vocab_size,
        "positions": config.positions,
        "eos_token_ids": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "config": read_object(source.folder / CONFIG, CheckpointError),
    }
    try:
        tokenizer = Tokenizer.from_folder(source.folder) if TOKENIZER in source.side_files() else None
        warnings = contradictions(
            read_side_files(source.folder, said, tokenizer, whole=True), CheckpointError, FROM_ONE_REPOSITORY
        )
        template = ChatTemplate.of_folder(source.folder) if source.task == "causal-lm" else None
        if template is not None and tokenizer is not None:
            require_control_tokens(template, tokenizer)
    except BundleError as error:
        raise CheckpointError(f"{error}; download it again") from error
    return warnings
