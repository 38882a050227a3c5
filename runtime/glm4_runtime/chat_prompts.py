"""Turns conversations into token ids, for commands that use one session."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm4_runtime.chat_template import ChatTemplate, require_control_tokens
from glm4_runtime.errors import RequestError
from glm4_runtime.prompts import Prompt
from glm4_runtime.template_traits import traits_of
from glm4_runtime.tokenizer import Tokenizer


class ChatPrompts:
    """
    Attributes:
        ends: ids of the tokens at which the template ends the model's turn.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self._template, self._tokenizer = ChatTemplate.from_folder(folder), tokenizer
        require_control_tokens(self._template, tokenizer)
        self._traits = traits_of(self._template, tokenizer.control_tokens)
        self.ends = tuple(tokenizer.control_tokens[name] for name in self._traits.ends)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Prompt, list[int]]:
        """The prompt and its ids. Raises :class:`RequestError` for what the template refuses or would drop."""
        if not self._traits.system and any(message["role"] == "system" for message in messages):
            raise RequestError(
                "this model's chat template drops system messages; say it in the first message of the user"
            )
        prompt = self._template.prompt(messages, control_tokens=self._tokenizer.control_tokens)
        return prompt, self._tokenizer.encode_prompt(prompt)
