"""Text that grows by pieces; adding a piece has a constant cost."""


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
        """Return the whole text, and empty this object."""
        text = str(self)
        self._pieces = []
        return text
