"""Compares greedy texts: how many tokens of two models' texts are equal from the start."""

from collections.abc import Sequence

from glm4_deploy.adapters import apply_adapter
from glm4_deploy.greedy import Step, fits_whole, reference_start
from glm4_deploy.validate.comparison import Comparison, Greedy
from glm4_deploy.validate.side_by_side import Bundle
from glm4_deploy.validate.text import Text
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime import SamplingParams, Session
from glm4_runtime.errors import RequestError, UnavailableError
from glm4_runtime.progress import Progress

PROMPTS, PROMPT_TOKENS, TOKENS = 8, 24, 48
GENERATE_STAGE = "generate"


def add_greedy(
    checkpoint: Checkpoint,
    bundles: Sequence[Bundle],
    text: Text,
    comparisons: Sequence[Comparison],
    available: int,
    progress: Progress,
) -> list[str]:
    """Generate with every model from the starts of the text's sequences, and compare; returns notes about failures."""
    room = min(one.manifest.limits.max_seq_len for one in bundles)
    tokens = min(TOKENS, room - 1)
    prompts = [list(ids[: min(PROMPT_TOKENS, room - tokens)]) for ids in text.sequences[:PROMPTS]]
    if tokens < 1:
        return ["Greedy texts were not compared: a slot of this bundle has no room for a token."]
    if not all(fits_whole(one.manifest, checkpoint, available) for one in bundles):
        return ["Greedy texts were not compared: both models whole do not fit into memory."]
    texts: dict[str, list[list[int]]] = {}
    notes = []
    total = len(prompts) * (1 + len(bundles))
    for name, one in zip(("bundle", "against"), bundles, strict=False):
        progress(GENERATE_STAGE, len(texts) * len(prompts), total)
        try:
            texts[name] = _bundle_texts(one, prompts, tokens)
        except UnavailableError as error:
            notes.append(f"Greedy texts of {one.folder} were not compared: {error}")
        except RequestError as error:  # logits that are not finite; the prompts are known to be valid
            texts[name] = [[] for _ in prompts]
            notes.append(f"{one.folder} could not generate a greedy text: {error}")
    texts["reference"], start = [], reference_start(checkpoint)
    for prompt in prompts:
        progress(GENERATE_STAGE, len(bundles) * len(prompts) + len(texts["reference"]), total)
        texts["reference"].append(_continue(start(), prompt, tokens))
    progress(GENERATE_STAGE, total, total)
    for comparison in comparisons:
        if comparison.expected in texts and comparison.actual in texts:
            pairs = zip(texts[comparison.expected], texts[comparison.actual], strict=True)
            comparison.greedy = Greedy(tokens, tuple(_common(one, other) for one, other in pairs))
    return notes


def _bundle_texts(bundle: Bundle, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with Session.open(bundle.folder, max_batch_size=1) as session:
        apply_adapter(session, bundle.adapter)
        return [[token.id for token in session.generate(prompt, params)] for prompt in prompts]


def _continue(step: Step, prompt: list[int], tokens: int) -> list[int]:
    ids: list[int] = []
    logits = step(prompt)
    while True:
        ids.append(int(logits.argmax()))
        if len(ids) == tokens:
            return ids
        logits = step(ids[-1:])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
