"""Which requests may share prefixes: those of one API key. The time of a first token, and the reported number of cached
tokens, would tell one key's user what another's has asked."""

import contextvars

_key: contextvars.ContextVar[bytes] = contextvars.ContextVar("glm4_api_key", default=b"")


def note_key(digest: bytes) -> None:
    """Record the digest of the current request's API key; empty without keys."""
    _key.set(digest)


def group() -> str:
    """The group of the current request, as :attr:`Request.group`."""
    return _key.get().hex()
