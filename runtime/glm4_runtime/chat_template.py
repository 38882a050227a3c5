"""Renders a conversation to a prompt, with the checkpoint's own chat template.

The template is code from the checkpoint. A worker process compiles and renders it in Jinja's sandbox, with limits on
time, memory and output. The template sees plain data only, and its errors fail one request.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm4_runtime.bundle.file_names import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from glm4_runtime.bundle.json_file import read_small
from glm4_runtime.errors import BundleError, OvertimeError, RequestError, some
from glm4_runtime.prompts import Prompt, marked
from glm4_runtime.tokenizer import Tokenizer, read_tokenizer_config, special_token_names
from glm4_runtime.workers.pool import WorkerPool
from glm4_runtime.workers.worker import TaskLimits, WorkerError

# How control tokens of this family are written, and a conversation that makes a template write its own.
_CONTROL = re.compile(r"<\|[A-Za-z0-9_]{1,64}\|>|\[gMASK\]|<sop>")
_TURNS = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)

# The names under which a checkpoint lists several templates.
_DEFAULT = "default"
_TOOL_USE = "tool_use"

# GLM-4's own are 2 to 10 kB.
_LONGEST_TEMPLATE = 2**20
_WORKERS = WorkerPool(
    "glm4_runtime.workers.templates",
    TaskLimits(seconds=1, deadline=20, memory=256 * 2**20, answer=16 * 2**20),
)


def start_template_worker() -> None:
    """Start the worker process early, in the background; the first template needs it."""
    _WORKERS.start()


class ChatTemplate:
    """The compiled chat templates of one model folder, by name. With tools, ``tool_use`` is used if it exists;
    otherwise ``default``.

    GLM-4's templates write the prefix [gMASK]<sop> themselves, so no prefix is added.
    """

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self._sources = {_DEFAULT: source} if isinstance(source, str) else dict(source)
        if _DEFAULT not in self._sources:
            raise BundleError(
                f"there is no chat template named {_DEFAULT!r}, only: {', '.join(self._sources) or 'none'}"
            )
        _check(self._sources)
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, path: str | Path) -> "ChatTemplate":
        """From ``chat_template.jinja``, else from ``chat_template`` in ``tokenizer_config.json``.

        Raises :class:`BundleError` where there is neither, or it is not a template.
        """
        config = read_tokenizer_config(path)
        return cls(_source(Path(path), config), special_token_names(config))

    @classmethod
    def of_folder(cls, path: str | Path) -> "ChatTemplate | None":
        """None for a base model, which has no template; a template that is there must be a good one."""
        config = read_tokenizer_config(path)
        if "chat_template" not in config and not (Path(path) / CHAT_TEMPLATE).is_file():
            return None
        return cls.from_folder(path)

    @property
    def source(self) -> str:
        """The template for conversations without tools."""
        return self._sources[_DEFAULT]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt as text."""
        return self.prompt(messages, tools, add_generation_prompt, **kwargs).text

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        control_tokens: Collection[str] = (),
        **kwargs: Any,
    ) -> Prompt:
        """The prompt, for :meth:`Tokenizer.encode_prompt`.

        A message's text parts are joined. ``content`` None becomes an empty text, because templates call string
        methods on it. Raises :class:`RequestError` if the messages are no conversation or the template refuses them,
        and :class:`OvertimeError` if rendering takes too long.

        Args:
            control_tokens: names of control tokens; inside messages and tools they are plain text.
            kwargs: further variables of the template.
        """
        conversation = _checked_messages(messages)
        if tools is not None and not (_is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
            raise RequestError("tools must be a list of JSON objects")
        try:
            said, mark = marked({"messages": conversation, "tools": tools or None}, control_tokens)
        except (TypeError, ValueError, RecursionError) as error:
            raise _no_json(error) from error
        name = _TOOL_USE if tools and _TOOL_USE in self._sources else _DEFAULT
        variables = {**self._special_tokens, **kwargs, **said, "add_generation_prompt": add_generation_prompt}
        return Prompt(self._rendered(name, variables), mark)

    def _rendered(self, name: str, variables: Mapping[str, Any]) -> str:
        try:
            answer = _WORKERS.call({"sources": self._sources, "name": name, "variables": variables})
        except WorkerError as error:
            kind = OvertimeError if error.overtime else RequestError
            raise kind(f"the chat template cannot render this conversation: {error}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise _no_json(error) from error
        if "text" not in answer:
            does, reason = next((_FAILURES[kind], reason) for kind, reason in answer.items())
            raise RequestError(f"the chat template {does} this conversation: {reason}")
        text: str = answer["text"]
        return text


def _no_json(error: Exception) -> RequestError:
    return RequestError(f"a chat template takes plain JSON data only: {error}")


def require_control_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Refuse a chat template whose control tokens the tokenizer does not have: they would reach the model as text.

    Raises:
        BundleError: naming them.
    """
    try:
        prompt = template.render(_TURNS)
    except RequestError:  # a template of another kind of conversation
        return
    named = dict.fromkeys(_CONTROL.findall(prompt))
    unknown = [name for name in named if not tokenizer.has_token(name)]
    if unknown:
        raise BundleError(
            f"the chat template ({CHAT_TEMPLATE} or {TOKENIZER_CONFIG}) writes {some(unknown)}, but {TOKENIZER} has "
            "no such token; copy both from one checkpoint"
        )


# Messages for the ways in which a worker fails.
_FAILURES = {"refused": "refuses", "failed": "fails on"}


def _check(sources: Mapping[str, str]) -> None:
    """Raises :class:`BundleError` if a source is no template, or costs too much to compile."""
    for name, source in sources.items():
        if len(source) > _LONGEST_TEMPLATE:
            raise BundleError(
                f"the chat template {name!r} has {len(source)} characters; at most {_LONGEST_TEMPLATE} are read"
            )
    try:
        wrong = _WORKERS.call({"sources": dict(sources), "name": None}).get("invalid")
    except WorkerError as error:
        raise BundleError(f"the chat template cannot be compiled: {error}") from error
    if wrong is not None:
        raise BundleError(
            f"the chat template {wrong['name']!r} is not valid at line {wrong['line']}: {wrong['reason']}"
        )


def _source(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str]:
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        try:
            return read_small(file, BundleError).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{file} is not UTF-8 text: {error}") from error
    found = config.get("chat_template")
    if isinstance(found, str):
        return found
    if found is None:
        raise BundleError(
            f"{folder} has no chat template, neither {CHAT_TEMPLATE} nor in {TOKENIZER_CONFIG}: "
            "a base model has none; give it a prompt instead of messages"
        )
    if _is_list(found) and all(
        isinstance(entry, Mapping)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
        for entry in found
    ):
        return {entry["name"]: entry["template"] for entry in found}
    raise BundleError(
        f"chat_template in {folder / TOKENIZER_CONFIG} must be a text or a list of {{name, template}}"
    )


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not _is_list(messages) or not messages:
        raise RequestError("messages must be a list of at least one {role, content}")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] must be an object with a role, such as 'user'")
        text = _text(message.get("content"), f"messages[{index}]")
        checked.append({**message, "content": text})
    return checked


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not _is_list(content):
        raise RequestError(f"{where}.content must be a text, a list of text parts or null")
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise RequestError(f"{where}.content may only hold text parts: this model reads text only")
    return "".join(part["text"] for part in content)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
