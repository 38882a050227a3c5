"""The tokens that end a text: the model's own, and the tokens with which a chat template ends a turn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm4_runtime.errors import Glm4Error


def end_tokens(folder: Path, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Names of end tokens.

    Returns:
        ``model``: a name for each id that ends any text; None if there is no tokenizer or it does not know the id;
        ``chat``: further names that end a turn of a chat. Empty if there is no usable template.
    """
    from glm4_runtime.tokenizer import Tokenizer

    try:
        control = Tokenizer.from_folder(folder).control_tokens
    except Glm4Error:
        return {"model": dict.fromkeys(map(str, eos_token_ids)), "chat": []}
    names = {token: name for name, token in control.items()}
    chat = [name for name in _turn_ends(folder, list(control)) if control[name] not in eos_token_ids]
    return {"model": {str(token): names.get(token) for token in eos_token_ids}, "chat": chat}


def _turn_ends(folder: Path, control_tokens: Sequence[str]) -> tuple[str, ...]:
    from glm4_runtime.chat_template import ChatTemplate
    from glm4_runtime.template_traits import traits_of

    try:
        return traits_of(ChatTemplate.from_folder(folder), control_tokens).ends
    except Glm4Error:
        return ()
