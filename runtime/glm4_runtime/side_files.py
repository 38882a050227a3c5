"""Compares the files beside the weights with the model's numbers and with each other.

``COMPARISONS`` lists all comparisons. Each says which value of one file does not fit which value of another. A
comparison refuses files that cannot work together, or warns about unusual values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4_runtime.bundle import MANIFEST, Manifest
from glm4_runtime.bundle.file_names import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from glm4_runtime.bundle.json_file import read_object, read_small
from glm4_runtime.errors import BundleError, Glm4Error, RequestError, one_line, shown
from glm4_runtime.tokenizer import Tokenizer, special_token_names

LONGEST_ID = 19  # digits


@dataclass(frozen=True)
class SideFiles:
    """The contents of the files.

    Attributes:
        model_file: the file with the next four values: ``config.json`` of a checkpoint, ``manifest.json`` of a
            bundle.
        config: the whole of ``config.json``, or a bundle's copy.
        generation, tokenizer_config, special_tokens: the JSON objects of the files of these names.
        added_tokens: id by name, by file: those that are listed beside ``tokenizer.json``.
        template: ``chat_template.jinja``.
        tokenizer: None if it does not exist or was not requested.
    """

    folder: Path
    model_file: str
    vocab_size: int
    positions: int
    eos_token_ids: Sequence[int]
    pad_token_id: int | None
    config: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: bytes | None = None
    tokenizer: Tokenizer | None = None


def read_side_files(
    folder: Path, model: Mapping[str, Any], tokenizer: Tokenizer | None, *, whole: bool = False
) -> SideFiles:
    """Read the JSON files of a checkpoint or bundle.

    Args:
        model: the fields of :class:`SideFiles` from the model's own file.
        whole: read ``tokenizer.json`` too, whose numbers a tokenizer does not keep where they leave a gap.

    Raises:
        BundleError: a file is no JSON object.
    """

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return read_object(path, BundleError) if path.is_file() else {}

    template = folder / CHAT_TEMPLATE

    tokenizer_config = read(TOKENIZER_CONFIG)
    listed = tokenizer_config.get("added_tokens_decoder")
    by_name = {
        entry["content"]: int(number) if number.isdecimal() and len(number) <= LONGEST_ID else number
        for number, entry in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }
    added: dict[str, Mapping[str, Any]] = {}
    if whole and tokenizer is not None:  # whose library has checked the form of the file
        added[TOKENIZER] = {
            token["content"]: token["id"] for token in read(TOKENIZER).get("added_tokens") or ()
        }
    added |= {TOKENIZER_CONFIG: by_name, ADDED_TOKENS: read(ADDED_TOKENS)}
    return SideFiles(
        folder=folder,
        generation=read(GENERATION_CONFIG),
        tokenizer_config=tokenizer_config,
        special_tokens=read(SPECIAL_TOKENS_MAP),
        added_tokens=added,
        template=read_small(template, BundleError) if template.is_file() else None,
        tokenizer=tokenizer,
        **model,
    )


def contradictions(files: SideFiles, error: type[Glm4Error], advice: str) -> list[str]:
    """Run all comparisons; returns warnings.

    Raises:
        ``error``: two files that cannot work together, with both values.
    """
    warnings = []
    for refuses, row in COMPARISONS:
        complaint = next(row(files), None)
        if complaint is not None and refuses:
            raise error(f"{files.folder}: {complaint}; {advice}")
        warnings += [complaint] * (complaint is not None)
    return [one_line(warning) for warning in warnings if warning]


def check_bundle(folder: Path, manifest: Manifest, tokenizer: Tokenizer | None = None) -> list[str]:
    """:func:`compare` of a bundle; without ``tokenizer``, of its small files only.

    Raises:
        BundleError: two files that cannot work together.
    """
    model = manifest.model
    said = {
        "model_file": MANIFEST,
        "vocab_size": model.vocab_size,
        "positions": model.max_positions,
        "eos_token_ids": model.eos_token_ids,
        "pad_token_id": model.pad_token_id,
        "config": manifest.config,
    }
    files = read_side_files(folder, said, tokenizer)
    return contradictions(files, BundleError, "export the bundle again from files of one model")


# The comparisons: each yields complaints -----------------------------------------------------------------


def _tokens_beyond(files: SideFiles) -> Iterator[str]:
    if files.tokenizer is None:
        return
    last = files.tokenizer.vocab_size - 1
    if last >= files.vocab_size:
        yield f"{TOKENIZER} has the token id {last}, but {_vocabulary(files)}"
    written = [token for token in files.tokenizer.first_ids() if token >= files.vocab_size]
    if written:
        yield f"{TOKENIZER} begins texts with the token id {written[0]}, but {_vocabulary(files)}"


def _added_tokens(files: SideFiles) -> Iterator[str]:
    for source, tokens in files.added_tokens.items():
        for name, token in tokens.items():
            if not (type(token) is int and 0 <= token < files.vocab_size):
                yield f"{source} gives {shown(name)} the id {shown(token)}, but {_vocabulary(files)}"
                continue
            known = None if files.tokenizer is None else _id_of(files.tokenizer, name)
            if known not in (None, token):
                yield f"{source} gives {shown(name)} the id {token}, but {TOKENIZER} as it is read gives it {known}"


def _generation_ids(files: SideFiles) -> Iterator[str]:
    for key in ("pad_token_id", "bos_token_id"):
        token = files.generation.get(key)
        if token is not None and not (type(token) is int and 0 <= token < files.vocab_size):
            yield f"{GENERATION_CONFIG} says {key} {shown(token)}, but {_vocabulary(files)}"


def _ends_of_a_bundle(files: SideFiles) -> Iterator[str]:
    said = _ids(files.generation.get("eos_token_id"))
    if files.model_file == MANIFEST and said and set(said) != set(files.eos_token_ids):
        yield (
            f"{GENERATION_CONFIG} says eos_token_id {shown(said)}, "
            f"but texts end at {shown(list(files.eos_token_ids))} by {MANIFEST}"
        )


def _ends_beyond(files: SideFiles) -> Iterator[str]:
    beyond = [token for token in files.eos_token_ids if token >= files.vocab_size]
    if beyond:
        source = GENERATION_CONFIG if _ids(files.generation.get("eos_token_id")) else files.model_file
        yield f"{source} says eos_token_id {shown(beyond)}, which end nothing: {_vocabulary(files)}"


def _ends_unknown(files: SideFiles) -> Iterator[str]:
    tokenizer = files.tokenizer
    if tokenizer is None:
        return
    for token in files.eos_token_ids:
        if token < files.vocab_size and not tokenizer.has_text(token, skip_special_tokens=False):
            yield f"{files.model_file} says eos_token_id {token}, but {TOKENIZER} has no token of this id"


def _ends_of_tokenizer(files: SideFiles) -> Iterator[str]:
    token = _role(files, "eos_token")
    if token is not None and token not in files.eos_token_ids:
        name = special_token_names(files.tokenizer_config)["eos_token"]
        yield (
            f"{TOKENIZER_CONFIG} says eos_token {shown(name)}, id {token}, but texts end at "
            f"{shown(list(files.eos_token_ids))} by {GENERATION_CONFIG} or {files.model_file}"
        )


def _two_configs(files: SideFiles) -> Iterator[str]:
    model, generation = (_ids(values.get("eos_token_id")) for values in (files.config, files.generation))
    if files.model_file == CONFIG and model and generation and not set(model) & set(generation):
        yield f"{CONFIG} says eos_token_id {shown(model)}, but {GENERATION_CONFIG} says {shown(generation)}"


def _padding(files: SideFiles) -> Iterator[str]:
    token = _role(files, "pad_token")
    if None not in (token, files.pad_token_id) and token != files.pad_token_id:
        yield f"{TOKENIZER_CONFIG} says pad_token of id {token}, but {files.model_file} says {files.pad_token_id}"


def _special_tokens(files: SideFiles) -> Iterator[str]:
    if files.tokenizer is None:
        return
    for role, name in special_token_names(files.tokenizer_config).items():
        if _id_of(files.tokenizer, name) is None:
            yield f"{TOKENIZER_CONFIG} says {role} {shown(name)}, but {TOKENIZER} has no such token"


def _two_maps(files: SideFiles) -> Iterator[str]:
    one, other = special_token_names(files.tokenizer_config), special_token_names(files.special_tokens)
    for role in one.keys() & other.keys():
        if one[role] != other[role]:
            yield (
                f"{TOKENIZER_CONFIG} says {role} {shown(one[role])}, but {SPECIAL_TOKENS_MAP} says {shown(other[role])}"
            )


def _length(files: SideFiles) -> Iterator[str]:
    length = files.tokenizer_config.get("model_max_length")
    if isinstance(length, int | float) and length < files.positions:
        yield (
            f"{TOKENIZER_CONFIG} says model_max_length {shown(length)}, "
            f"but {files.model_file} has {files.positions} positions"
        )


def _few_tokens(files: SideFiles) -> Iterator[str]:
    size = None if files.tokenizer is None else files.tokenizer.vocab_size
    if size is not None and 2 * size < files.vocab_size:
        yield f"{TOKENIZER} has {size} token ids, but {_vocabulary(files)}"


def _labels(files: SideFiles) -> Iterator[str]:
    names, numbers = files.config.get("id2label"), files.config.get("label2id")
    if not (isinstance(names, dict) and isinstance(numbers, dict)):
        return
    for label, number in numbers.items():
        if names.get(str(number)) != label:
            yield (
                f"label2id in {CONFIG} gives {shown(label)} the number {shown(number)}, "
                f"but id2label gives this number to {shown(names.get(str(number)))}"
            )


def _two_templates(files: SideFiles) -> Iterator[str]:
    own, taken = files.tokenizer_config.get("chat_template"), files.template
    if isinstance(own, str) and taken is not None and own.encode(errors="replace").strip() != taken.strip():
        yield (
            f"{CHAT_TEMPLATE} has {len(taken)} bytes and {TOKENIZER_CONFIG} has another chat_template of "
            f"{len(own.encode(errors='replace'))}; {CHAT_TEMPLATE} is taken"
        )


# Whether a comparison refuses, and the comparison. Only its first complaint is reported.
COMPARISONS: tuple[tuple[bool, Callable[[SideFiles], Iterator[str]]], ...] = (
    (True, _added_tokens),
    (True, _tokens_beyond),
    (True, _generation_ids),
    (False, _ends_of_a_bundle),
    (False, _ends_beyond),
    (False, _ends_unknown),
    (False, _ends_of_tokenizer),
    (False, _two_configs),
    (False, _padding),
    (False, _special_tokens),
    (False, _two_maps),
    (False, _length),
    (False, _few_tokens),
    (False, _labels),
    (False, _two_templates),
)


def _vocabulary(files: SideFiles) -> str:
    return f"{files.model_file} has a vocabulary of {files.vocab_size}"


def _ids(value: object) -> list[int]:
    """Token ids of a configuration: one id, or a list."""
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]


def _role(files: SideFiles, role: str) -> int | None:
    """The id of a special token in the tokenizer's configuration."""
    name = special_token_names(files.tokenizer_config).get(role)
    return None if name is None or files.tokenizer is None else _id_of(files.tokenizer, name)


def _id_of(tokenizer: Tokenizer, name: str) -> int | None:
    try:
        return tokenizer.id_of(name)
    except RequestError:
        return None
