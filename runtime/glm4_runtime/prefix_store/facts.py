"""Everything that keys and values depend on, beside the tokens. Sequences with other facts share no file."""

import hashlib
import json
import platform
from typing import Any

from glm4_runtime.session.base import Session

_ROUNDS = 100_000  # of PBKDF2, so that a cache folder does not reveal a short API key


def facts_of(session: Session, adapter: str | None, group: str) -> str:
    """The facts as JSON, always with the same text for the same facts.

    Args:
        adapter: the LoRA adapter's name; its contents count, and not its name.
        group: who may share prefixes, such as the digest of an API key. Empty: everybody.
    """
    manifest = session.manifest
    facts = {
        "bundle": bundle_digest(session),
        "adapter": "" if adapter is None else session.adapter_digest(adapter),
        "group": _hidden(group),
        "cache": manifest.kv_cache,
        "rope": _rope(manifest.config),
        "target": manifest.target,
        "kernels": dict(session.kernels),
        "machine": platform.machine(),
    }
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def bundle_digest(session: Session) -> str:
    """SHA-256 over the names and hashes of the bundle's files: graph, weights and tokenizer."""
    files = sorted((name, entry.sha256) for name, entry in session.manifest.files.items())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _hidden(group: str) -> str:
    """A name of the group from which a short API key cannot be guessed soon. Takes about 40 ms."""
    return (
        hashlib.pbkdf2_hmac("sha256", group.encode(), b"glm4-deploy prefix cache", _ROUNDS).hex()
        if group
        else ""
    )


def _rope(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if "rope" in name or "rotary" in name}
