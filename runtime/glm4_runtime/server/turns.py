"""Builds a conversation from the items of other APIs, which list texts, calls and results one by one."""

from dataclasses import dataclass, field
from typing import Literal

from glm4_runtime.errors import RequestError
from glm4_runtime.server.messages import Call, CalledFunction, Message
from glm4_runtime.server.strict import MOST_PARTS

Role = Literal["system", "user", "assistant"]


@dataclass
class _Turn:
    role: Role | Literal["tool"]
    place: str
    texts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    answers: str | None = None

    def message(self) -> Message:
        message = Message(
            role=self.role,
            content="".join(self.texts),
            tool_calls=self.calls or None,
            tool_call_id=self.answers,
        )
        return message.at(self.place)


class Turns:
    """The turns of a conversation so far. ``place`` is where the client wrote an item, for errors.

    Calls that follow an assistant's text, and texts that follow its calls, belong to one turn.
    """

    def __init__(self) -> None:
        self._turns: list[_Turn] = []

    def say(self, role: Role, text: str, place: str) -> None:
        last = self._turns[-1] if self._turns else None
        if role == "assistant" and last is not None and last.calls:
            last.texts.append(text)
        else:
            self._turns.append(_Turn(role, place, [text]))

    def call(self, call_id: str, name: str, arguments: str, place: str) -> None:
        if not self._turns or self._turns[-1].role != "assistant":
            self._turns.append(_Turn("assistant", place))
        calls = self._turns[-1].calls
        if len(calls) == MOST_PARTS:
            raise RequestError(f"{place}: there are more than {MOST_PARTS} calls in a row")
        calls.append(Call(id=call_id, function=CalledFunction(name=name, arguments=arguments)))

    def answer(self, call_id: str, text: str, place: str) -> None:
        """The result of a call."""
        self._turns.append(_Turn("tool", place, [text], answers=call_id))

    def messages(self) -> list[Message]:
        """Raises :class:`RequestError` if there are none or too many."""
        if not 1 <= len(self._turns) <= MOST_PARTS:
            raise RequestError(
                f"the conversation has {len(self._turns)} messages, but must have 1 to {MOST_PARTS}"
            )
        return [turn.message() for turn in self._turns]
