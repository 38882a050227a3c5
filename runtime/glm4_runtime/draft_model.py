"""Opens a draft model for a session, if both models have the same tokens."""

from pathlib import Path

from glm4_runtime.bundle import Manifest, read_manifest
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.errors import BundleError
from glm4_runtime.opening import check_opening
from glm4_runtime.session import Session
from glm4_runtime.session.warm_up import warm_up
from glm4_runtime.tokenizer import Tokenizer


def open_draft(target: Session, bundle: str | Path) -> Session:
    """Open the draft model of ``target``, with as many slots, positions and threads as the target, if the bundle allows.

    Raises:
        BundleError: no bundle, a damaged one, no causal LM, or one with other tokens; before its weights are opened.
        Glm4Error: its first step failed.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    if (target.manifest.task, manifest.task) != ("causal-lm", "causal-lm"):
        raise BundleError(
            f"{folder} was exported for {manifest.task} and {target.folder} for {target.manifest.task}; a draft model "
            "needs two bundles for causal-lm"
        )
    check_opening(folder, manifest, hashes=False)
    require_same_tokens(target, folder, manifest)
    session = Session.open(
        folder,
        threads=target.threads,
        max_seq_len=min(target.max_seq_len, manifest.limits.max_seq_len),
        max_batch_size=min(target.max_batch_size, manifest.limits.max_batch_size),
    )
    try:
        warm_up(session)  # else the first draft's time says that drafts do not pay
    except BaseException:
        session.close()
        raise
    return session


def require_same_tokens(target: Session, folder: Path, manifest: Manifest) -> None:
    """Prove that a bundle has the tokens of ``target``: by the hash of tokenizer.json, else id for id.

    Raises:
        BundleError: it has not; names the first difference.
    """
    sizes = target.manifest.model.vocab_size, manifest.model.vocab_size
    if sizes[0] != sizes[1]:
        raise _other_tokens(target, folder, f"{sizes[0]} and {sizes[1]} logits of a position")
    files = target.manifest.files.get(TOKENIZER), manifest.files.get(TOKENIZER)
    for entry, of in zip(files, (target.folder, folder), strict=True):
        if entry is None:
            raise BundleError(
                f"{of} has no tokenizer.json, so a draft model cannot be proved to have the same tokens; add the file "
                "to the checkpoint and export again"
            )
    if files[0] is not None and files[1] is not None and files[0].sha256 == files[1].sha256:
        return
    ours, theirs = target.tokenizer, Tokenizer.from_folder(folder)
    assert ours is not None
    for token in range(max(ours.vocab_size, theirs.vocab_size)):
        pair = _spelled(ours, token), _spelled(theirs, token)
        if pair[0] != pair[1]:
            raise _other_tokens(target, folder, f"token {token} is {pair[0]} and {pair[1]}")


def _spelled(tokenizer: Tokenizer, token: int) -> str:
    if token >= tokenizer.vocab_size or not tokenizer.has_text(token, skip_special_tokens=False):
        return "not there"
    return f"{tokenizer.token_of(token)!r:.60}" + (" (control)" if token in tokenizer.special_ids else "")


def _other_tokens(target: Session, folder: Path, difference: str) -> BundleError:
    return BundleError(
        f"{folder} cannot draft for {target.folder}, because their tokens differ: {difference}; give a model of the same "
        "family with the same tokenizer"
    )
