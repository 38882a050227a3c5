"""Text that grows by pieces; adding one costs the same however much there is."""


class TextPieces:
    """Pieces of a text, joined when they are read."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def __str__(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def add(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def take(self) -> str:
        """All of it; nothing is left."""
        text = str(self)
        self._pieces = []
        return text
