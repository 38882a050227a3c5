"""Cuts the deltas of one reply into its parts: thinking, texts and calls, in the order in which the model writes them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from glm4_runtime.server.reply import Delta
from glm4_runtime.text_pieces import TextPieces

Kind = Literal["thinking", "text", "call"]
# kind of part -> the key of its text in a delta
_KEYS: dict[Kind, str] = {"thinking": "reasoning_content", "text": "content"}


@dataclass
class Part:
    """
    Attributes:
        index: its position among the parts of the reply.
        call_id, name: of a call.
        text: the text so far; of a call, its arguments.
        ended: whether another part or the end of the reply followed.
    """

    kind: Kind
    index: int
    call_id: str = ""
    name: str = ""
    text: TextPieces = field(default_factory=TextPieces)
    ended: bool = False


@dataclass(frozen=True)
class PartEvent:
    """A part begins, gets further ``text``, or ends."""

    stage: Literal["begins", "grows", "ends"]
    part: Part
    text: str = ""


class Parts:
    """The parts of one reply so far, in ``listed``."""

    def __init__(self) -> None:
        self.listed: list[Part] = []

    def push(self, delta: Delta) -> Iterator[PartEvent]:
        """The events of a delta; an empty delta ends the reply."""
        if not delta:
            yield from self._end()
        for kind, key in _KEYS.items():
            if text := delta.get(key):
                yield from self._extend(kind, text)
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                yield from self.begin("call", call["id"], call["function"]["name"])
            yield from self._extend("call", call["function"]["arguments"])

    def _extend(self, kind: Kind, text: str) -> Iterator[PartEvent]:
        if not self.listed or self.listed[-1].kind != kind:
            yield from self.begin(kind)
        part = self.listed[-1]
        if text:
            part.text.add(text)
            yield PartEvent("grows", part, text)

    def begin(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[PartEvent]:
        """End the last part, and begin another one."""
        yield from self._end()
        part = Part(kind, len(self.listed), call_id, name)
        self.listed.append(part)
        yield PartEvent("begins", part)

    def _end(self) -> Iterator[PartEvent]:
        if self.listed and not self.listed[-1].ended:
            self.listed[-1].ended = True
            yield PartEvent("ends", self.listed[-1])
