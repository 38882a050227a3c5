"""Keeps finished responses in memory, so that later requests can continue and read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.responses.schema import Item, ReferenceItem, ResponsesRequest

# Maximum bytes of all stored conversations, as JSON.
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """
    Attributes:
        owner: digest of the API key of its request; empty without keys.
        response: the answer as JSON.
        items: the conversation up to the end of the response.
        output: the response's own items by id.
        size: bytes that count for the limit. Items that responses share count for each.
    """

    owner: bytes
    response: dict[str, Any]
    items: tuple[Item, ...]
    output: dict[str, Item] = field(default_factory=dict)
    size: int = 0


class ResponseStore:
    """The stored responses. Beyond a limit, those that were not used for longest are dropped. For the event loop only."""

    def __init__(self, most: int, most_bytes: int = _MOST_BYTES) -> None:
        """``most``: maximum number of responses; 0 stores none."""
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0
        self._stored: dict[str, Stored] = {}  # the one that was used last is at the end

    def __len__(self) -> int:
        return len(self._stored)

    def keeps(self, body: ResponsesRequest) -> bool:
        """Whether the answer is to be stored. Raises :class:`ApiError` (400) if it should be, but cannot."""
        if body.store:
            self._require_open("store")
        return self._most > 0 and body.store is not False

    def put(self, stored: Stored) -> None:
        self._stored[stored.response["id"]] = stored
        self._bytes += stored.size
        while len(self._stored) > self._most or self._bytes > self._most_bytes:
            self._drop(next(iter(self._stored)))

    def get(self, owner: bytes, response_id: str, param: str | None = None) -> Stored:
        """Raises :class:`ApiError`: 400 if nothing is stored here, 404 if ``owner`` has no such response."""
        self._require_open(param)
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            raise ApiError(
                404,
                f"there is no response {response_id[:100]!r} here; the server keeps the last {self._most}, until it stops",
                param=param,
            )
        self._stored[response_id] = self._stored.pop(response_id)
        return stored

    def delete(self, owner: bytes, response_id: str) -> None:
        """Raises the errors of :meth:`get`."""
        self.get(owner, response_id)
        self._drop(response_id)

    def resolved(self, owner: bytes, items: Sequence[Item]) -> list[Item]:
        """The items, with stored ones instead of references. Raises :class:`ApiError`: 400 or 404."""
        return [
            self._referred(owner, item, f"input[{index}]") if isinstance(item, ReferenceItem) else item
            for index, item in enumerate(items)
        ]

    def _referred(self, owner: bytes, item: ReferenceItem, place: str) -> Item:
        self._require_open(place)
        for stored in reversed(self._stored.values()):
            if stored.owner == owner and item.id in stored.output:
                return stored.output[item.id]
        raise ApiError(
            404, f"{place}: there is no stored item {item.id[:100]!r}; send the item itself", param=place
        )

    def _require_open(self, param: str | None) -> None:
        if not self._most:
            raise ApiError(
                400,
                "this server stores no responses: leave store out and send the whole conversation, or start the server "
                "with --max-stored",
                param=param,
            )

    def _drop(self, response_id: str) -> None:
        self._bytes -= self._stored.pop(response_id).size
