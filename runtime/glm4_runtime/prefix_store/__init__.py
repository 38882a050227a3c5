"""A prefix cache on disk: keys and values of prompts, for later processes and other sessions of the same bundle."""

from glm4_runtime.prefix_store.folder import CacheFolder, Entry
from glm4_runtime.prefix_store.piece import TOKENS
from glm4_runtime.prefix_store.store import DEFAULT_BYTES, PrefixStore

__all__ = ["DEFAULT_BYTES", "TOKENS", "CacheFolder", "Entry", "PrefixStore"]
