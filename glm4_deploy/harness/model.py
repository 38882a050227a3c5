"""Makes a bundle a model of lm-evaluation-harness.

Texts are encoded as in the harness's ``hf`` model: with the tokenizer's prefix (GLM-4: [gMASK]<sop>), unless the text
already begins with the prefix. A rendered chat template does.
"""

import queue
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from glm4_runtime import SamplingParams, Session
from glm4_runtime.chat_template import ChatTemplate
from glm4_runtime.errors import RequestError
from glm4_runtime.reasoning import CLOSE, begins_inside
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Scheduler

MAX_GEN_TOKS = 256  # the harness's default
# Names of the supported generation options of the harness. Other options are refused.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")

# A log-likelihood request: the text (a key of the harness's cache), and the token ids of context and continuation.
Scored = tuple[Any, list[int], list[int]]


class BundleModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """The bundle of a causal LM.

    ``--model_args`` takes:
        bundle: the bundle's folder.
        max_length: most tokens of prompt and answer together. Default: the bundle's limit.
        max_gen_toks: most tokens of an answer, for tasks that set no limit.
    """

    backend = "causal"

    def __init__(
        self,
        bundle: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        **others: Any,
    ) -> None:
        """Open the bundle.

        Args:
            others: options that the harness passes to every model, such as ``batch_size`` and ``device``. They are
                ignored: the bundle determines the number of slots and the device.

        Raises:
            Glm4Error: an option is unknown, the bundle cannot be opened, or the bundle has no tokenizer.
        """
        super().__init__()
        if bundle is None:
            raise RequestError("name the bundle: --model_args bundle=FOLDER")
        unknown = sorted(
            others.keys() - {"batch_size", "max_batch_size", "device", "pretrained", "trust_remote_code"}
        )
        if unknown:
            raise RequestError(
                f"--model_args has no {unknown[0]}; it has bundle, max_length and max_gen_toks"
            )
        self._folder = Path(bundle)
        self._session = Session.open(self._folder)
        tokenizer = self._session.tokenizer
        if tokenizer is None:
            raise RequestError(f"{bundle} has no tokenizer; export a checkpoint with tokenizer.json")
        self._tokenizer = tokenizer
        longest = self._session.max_seq_len
        self.max_length = min(int(max_length or longest), longest)
        self.max_gen_toks = int(max_gen_toks)
        self._template: ChatTemplate | None = None

    @property
    def eot_token_id(self) -> int:
        name = self._tokenizer.special_tokens.get("eos_token")
        return self._session.manifest.model.eos_token_ids[0] if name is None else self._tokenizer.id_of(name)

    @property
    def prefix_token_id(self) -> int:
        name = self._tokenizer.special_tokens.get("bos_token")
        return self.eot_token_id if name is None else self._tokenizer.id_of(name)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness, which uses it in the file names of its request cache."""
        return f"{self._folder.name}-{self._session.manifest.source_sha256[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the bundle's chat template. The harness stores the source with its results."""
        if not chat_template:
            return None
        self._template = ChatTemplate.from_folder(self._folder)
        return self._template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self._template is None:
            self._template = ChatTemplate.from_folder(self._folder)
        if add_generation_prompt:
            return self._template.render(chat_history)
        # The last message is the start of the answer; the model continues it.
        rendered, begun = (
            self._template.render(chat_history, None, False),
            chat_history[-1]["content"].strip(),
        )
        return rendered[: rendered.rindex(begun) + len(begun)]

    def token_logprobs(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Log-probability of each token after the first, in nats, float64 [len(ids) - 1]. The text is read once."""
        return self._session.log_likelihood(ids[:1], ids[1:]).logprobs

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request: the continuation's log-probability, and whether greedy decoding would generate it."""
        found: dict[int, tuple[float, bool]] = {}
        cut = [_fitting(context, continuation, self.max_length) for _, context, continuation in requests]
        order = sorted(range(len(cut)), key=lambda place: cut[place][0])
        bar = tqdm(total=len(cut), desc="score", disable=disable_tqdm)
        for _, same in groupby(order, key=lambda place: cut[place][0]):
            places = list(same)
            scores = self._session.log_likelihoods(cut[places[0]][0], [cut[place][1] for place in places])
            for place, score in zip(places, scores, strict=True):
                found[place] = score.total, score.greedy
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
            bar.update(len(places))
        bar.close()
        return [found[place] for place in range(len(cut))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in tqdm([each.args for each in requests], desc="score texts", disable=disable_tqdm):
            windows = map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            scored = self._loglikelihood_tokens([(None, *window) for window in windows], disable_tqdm=True)
            totals.append(sum(total for total, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [self._asked(*each.args) for each in requests]
        answers = [""] * len(asked)
        bar = tqdm(total=len(asked), desc="generate", disable=disable_tqdm)
        for place, text in generated(self._session, [request for request, _ in asked]):
            answers[place] = asked[place][1](text)
            self.cache_hook.add_partial("generate_until", requests[place].args, answers[place])
            bar.update(1)
        bar.close()
        return answers

    def _asked(self, context: str, options: dict[str, Any]) -> tuple[Request, Callable[[str], str]]:
        """The request for one prompt, and a function that extracts the answer from the generated text."""
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        until, most = options.pop("until"), options.pop("max_gen_toks")
        options.pop("do_sample", None)
        unknown = sorted(name for name in options.keys() - set(SAMPLING) if options[name] is not None)
        if unknown:
            raise RequestError(
                f"a task asks for {unknown[0]}, which a bundle cannot do; leave it out of its options"
            )
        if not 0 < most < self.max_length:
            raise RequestError(f"a task asks for {most} tokens, but prompt and answer have {self.max_length}")
        prompt = self.tok_encode(context)[-(self.max_length - most) :]
        thinks = begins_inside(context)
        # A stop string inside the reasoning must not end the answer.
        stops = () if thinks else tuple(stop for stop in until if stop)
        params = SamplingParams(max_tokens=most, stop=stops, **options)
        request = Request(tuple(prompt), params, logprobs=False)

        def answer(text: str) -> str:
            if thinks:
                text = text.partition(CLOSE)[2].lstrip()
            return str(postprocess_generated_text(text, until, None))

        return request, answer


def generated(session: Session, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
    """Generate all requests, as many at a time as the bundle has slots.

    Yields:
        The index of a request and its text, in the order of completion.

    Raises:
        Glm4Error: a request failed.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    scheduler = Scheduler(session, max_queue=max(1, len(requests)), speculation=False)
    scheduler.start()
    try:
        for place, request in enumerate(requests):
            scheduler.submit(request, partial(_put, events, place))
        texts: list[list[str]] = [[] for _ in requests]
        left = len(requests)
        while left:
            place, event = events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Generated):
                texts[place].append(event.token.text)
            if event.last:
                left -= 1
                yield place, "".join(texts[place])
    finally:
        scheduler.stop(0)


def _put(events: "queue.SimpleQueue[tuple[int, Event]]", place: int, event: Event) -> None:
    events.put((place, event))


def _fitting(context: list[int], continuation: list[int], longest: int) -> tuple[tuple[int, ...], list[int]]:
    """Cut the start of the context, so that context and continuation fit into the model.

    The last token is only predicted and not an input, so ``longest + 1`` tokens fit.

    Raises:
        RequestError: the continuation alone is longer than ``longest``.
    """
    if len(continuation) > longest:
        raise RequestError(
            f"a continuation has {len(continuation)} tokens, but the model has room for {longest}"
        )
    return tuple(
        (context + continuation)[-(longest + 1) : len(context + continuation) - len(continuation)]
    ), continuation
