"""Writes the parts of a reply as items of the Responses API, and as the events of these items."""

import base64
import secrets
from collections.abc import Iterator
from typing import Any

from glm4_runtime.server.event_stream import Chunk
from glm4_runtime.server.parts import Part, PartEvent
from glm4_runtime.server.reply import Reply

Item = dict[str, Any]
_PREFIXES = {"thinking": "rs", "text": "msg", "call": "fc"}


class ItemWriter:
    """The items of one reply so far, in ``items``. An item that has begun, but not ended, is not in the list."""

    def __init__(self, summarized: bool, encrypted: bool, with_logprobs: Reply | None) -> None:
        """
        summarized: thinking is the summary of its item; otherwise the content.
        encrypted: thinking has ``encrypted_content`` too.
        with_logprobs: the reply whose log-probabilities texts have; None for none.
        """
        self._summarized, self._encrypted, self._reply = summarized, encrypted, with_logprobs
        self.items: list[Item] = []
        self._id = ""
        self._logprobs: list[dict[str, Any]] = []
        self._seen = 0  # log-probabilities that were taken

    def events(self, event: PartEvent, cut: bool = False) -> Iterator[Chunk]:
        """The events of a part's event. ``cut``: the reply ended here at its length limit."""
        if event.stage == "begins":
            yield from self._begin(event.part)
        elif event.stage == "grows":
            yield self._growth(event.part, event.text)
        else:
            yield from self._end(event.part, "incomplete" if cut else "completed")

    def skip_logprobs(self) -> None:
        """Leave out the log-probabilities of tokens that did not extend a text."""
        self._take_logprobs()

    def _begin(self, part: Part) -> Iterator[Chunk]:
        self._id = f"{_PREFIXES[part.kind]}_{secrets.token_hex(24)}"
        self._logprobs = []
        item = self._item(part, "in_progress")
        if part.kind == "thinking":
            item |= {"summary": []} if self._summarized else {"content": []}
        yield {"type": "response.output_item.added", "output_index": part.index, "item": item}
        if part.kind != "call":
            yield self._about(part, f"{self._part_name(part)}.added") | {"part": self._content(part)}

    def _growth(self, part: Part, text: str) -> Chunk:
        told = self._about(part, f"{self._text_name(part)}.delta") | {"delta": text}
        if part.kind != "text":
            return told
        taken = self._take_logprobs()
        self._logprobs += taken
        return told | {"logprobs": _without_bytes(taken)}

    def _end(self, part: Part, status: str) -> Iterator[Chunk]:
        told = self._about(part, f"{self._text_name(part)}.done")
        key = "arguments" if part.kind == "call" else "text"
        logprobs = {"logprobs": _without_bytes(self._logprobs)} if part.kind == "text" else {}
        yield told | {key: str(part.text)} | logprobs
        if part.kind != "call":
            yield self._about(part, f"{self._part_name(part)}.done") | {"part": self._content(part)}
        item = self._item(part, status)
        self.items.append(item)
        yield {"type": "response.output_item.done", "output_index": part.index, "item": item}

    def _about(self, part: Part, event: str) -> Chunk:
        """The head of an event within an item."""
        told: Chunk = {"type": f"response.{event}", "item_id": self._id, "output_index": part.index}
        if part.kind == "call":
            return told
        return told | {"summary_index" if self._is_summary(part) else "content_index": 0}

    def _is_summary(self, part: Part) -> bool:
        return part.kind == "thinking" and self._summarized

    def _part_name(self, part: Part) -> str:
        return "reasoning_summary_part" if self._is_summary(part) else "content_part"

    def _text_name(self, part: Part) -> str:
        if part.kind == "thinking":
            return "reasoning_summary_text" if self._summarized else "reasoning_text"
        return "output_text" if part.kind == "text" else "function_call_arguments"

    def _content(self, part: Part) -> dict[str, Any]:
        text = str(part.text)
        if part.kind == "thinking":
            return {"type": "summary_text" if self._summarized else "reasoning_text", "text": text}
        logprobs = {"logprobs": list(self._logprobs)} if self._reply is not None else {}
        return {"type": "output_text", "text": text, "annotations": []} | logprobs

    def _item(self, part: Part, status: str) -> Item:
        head = {"id": self._id, "status": status}
        if part.kind == "call":
            called = {"call_id": part.call_id, "name": part.name, "arguments": str(part.text)}
            return head | {"type": "function_call"} | called
        content = [self._content(part)] if status != "in_progress" else []
        if part.kind == "text":
            return head | {"type": "message", "role": "assistant", "content": content}
        item = head | {"type": "reasoning", "summary": content if self._summarized else []}
        item |= {} if self._summarized else {"content": content}
        if self._encrypted and content:
            text = str(part.text).encode("utf-8", "surrogatepass")
            item["encrypted_content"] = base64.b64encode(text).decode()
        return item

    def _take_logprobs(self) -> list[dict[str, Any]]:
        """The log-probabilities of the answer's tokens since the last call, without those of the thinking."""
        if self._reply is None:
            return []
        first = max(self._seen, self._reply.thought_tokens)
        self._seen = len(self._reply.logprobs)
        return self._reply.logprobs[first:]


def _without_bytes(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities as events have them."""
    return [
        {
            "token": entry["token"],
            "logprob": entry["logprob"],
            "top_logprobs": [
                {"token": top["token"], "logprob": top["logprob"]} for top in entry["top_logprobs"]
            ],
        }
        for entry in entries
    ]
