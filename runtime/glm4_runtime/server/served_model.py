"""The model that all routes share: one open bundle, with its scheduler or worker thread."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from glm4_runtime.backend import Backend, OpenBundle
from glm4_runtime.chat_template import ChatTemplate, require_control_tokens
from glm4_runtime.defaults import read_sampling_defaults
from glm4_runtime.draft_model import open_draft
from glm4_runtime.errors import BundleError, DeadlineError, RequestError
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.prompts import Prompt
from glm4_runtime.scheduler import Request, Scheduler, SchedulerStats
from glm4_runtime.server import adapters, log, sharing
from glm4_runtime.server.adapters import ModelNames
from glm4_runtime.server.conversation import Conversation
from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.lanes import Lanes
from glm4_runtime.server.messages import Message
from glm4_runtime.server.metrics import Metrics
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.server.running_replies import RunningReplies
from glm4_runtime.server.unread import Unread, UnreadOfOne
from glm4_runtime.session import Session
from glm4_runtime.structured import GrammarCompiler
from glm4_runtime.tokenizer import Tokenizer

T = TypeVar("T")

_TURN = "<|assistant|>"


class ServedModel:
    """
    Attributes:
        name: the model's name in the API.
        names: the names of the model, of its adapters, and aliases.
        tokenizer: the bundle's tokenizer.
        conversation: renders the chat template. None: the bundle has no template, or does not generate.
        turn_ends: ids of tokens that end the model's turn in the chat template, without the model's EOS tokens.
        ends: ids of the model's EOS tokens, followed by ``turn_ends``.
        turn_token: the id of ``<|assistant|>``. None: the tokenizer has no such token.
        defaults: values of the sampling parameters that a request does not set.
        draining: whether the server shuts down and refuses new requests.
    """

    def __init__(
        self,
        session: OpenBundle,
        options: ServerOptions,
        scheduler: Backend | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """
        Args:
            session: the bundle. Without ``scheduler`` it must be a :class:`Session`, which then runs all requests.
            scheduler: runs the requests of a causal LM. None: it makes one. :meth:`start` starts it.
            metrics: those of the model that this one replaces, which go on; see :meth:`Metrics.follow`.

        Raises:
            BundleError: the bundle has no tokenizer.
        """
        if session.tokenizer is None:
            raise BundleError(
                f"{session.folder} has no tokenizer.json; add it to the checkpoint and export again"
            )
        self.session, self.options = session, options
        self.tokenizer: Tokenizer = session.tokenizer
        self.names = ModelNames(options, session.folder)
        self.name = self.names.base
        self.created = int(time.time())
        self.draining = self._hurried = False
        self.turn_token = _turn_token(self.tokenizer)
        self.defaults = read_sampling_defaults(session.folder)
        self.metrics = metrics or Metrics(self.stats, self.stats_by_replica)
        generates = session.manifest.task == "causal-lm"
        if options.cache is not None and not generates:
            raise RequestError(
                "this bundle does not generate text, and has no prefixes to store; leave --cache out"
            )
        if options.draft is not None and not generates:
            raise RequestError("this bundle does not generate text, and needs no drafts; leave --draft out")
        self._scheduler = (scheduler or _local(session, options)) if generates else None
        self._worker = None if generates else ThreadPoolExecutor(1, "glm4-session")
        self._waiting = 0
        self._lanes = Lanes()
        self._unread = Unread()
        self._drain: threading.Thread | None = None
        self.conversation = _conversation(session.folder, self.tokenizer) if generates else None
        eos = session.manifest.model.eos_token_ids
        traits = None if self.conversation is None else self.conversation.traits
        named = () if traits is None else (self.tokenizer.control_tokens[name] for name in traits.ends)
        self.turn_ends = tuple(token for token in named if token not in eos)
        self.ends = (*eos, *self.turn_ends)
        self.grammars = (
            GrammarCompiler(self.tokenizer, session.manifest.model.vocab_size, self.ends)
            if generates
            else None
        )

    def start(self) -> None:
        if self._scheduler is not None:
            self._scheduler.start()

    def drain(self, at_once: bool = False) -> None:
        """Refuse new requests, and end the running ones after ``drain_timeout`` seconds. Returns at once.

        Args:
            at_once: end the running requests now. Allowed after an earlier call without ``at_once``.
        """
        if self._drain is None or (at_once and not self._hurried):
            self.draining, self._hurried = True, at_once
            seconds = 0.0 if at_once else self.options.drain_timeout
            self._drain = threading.Thread(target=self._stop, args=(seconds,), name="glm4-drain", daemon=True)
            self._drain.start()

    @property
    def drained(self) -> bool:
        """Whether :meth:`drain` was called and all requests have ended."""
        return self._drain is not None and not self._drain.is_alive()

    @property
    def load(self) -> dict[str, Any]:
        """Numbers of running and waiting requests."""
        stats = self.stats()
        if stats is None:
            return {"waiting": self._waiting}
        return {"active": stats.active, "queued": stats.queued}

    def close(self) -> None:
        """Call :meth:`drain`, wait until it is done, and close the session."""
        self.drain()
        assert self._drain is not None
        self._drain.join()
        self._lanes.close()
        self.session.close()

    def _stop(self, seconds: float) -> None:
        if self._scheduler is not None:
            self._scheduler.stop(seconds)
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def stats_by_replica(self) -> Mapping[str, SchedulerStats]:
        """The statistics of each replica that is alive; empty without replicas."""
        return {} if self._scheduler is None else self._scheduler.stats_by_replica()

    def stats(self) -> SchedulerStats | None:
        """The statistics of the requests. None: the bundle does not generate text."""
        return None if self._scheduler is None else self._scheduler.stats()

    # Asking -------------------------------------------------------------------------------------

    def require_model(self, name: str | None) -> None:
        """Raises :class:`ApiError` (404) if there is no such model. None means the base model."""
        self.names.adapter_of(name)

    def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter as a further model. Blocks. Raises :class:`ApiError`."""
        self._require_lora_loading()
        adapters.load(self._scheduler, self.names, name, folder)

    def unload_adapter(self, name: str) -> None:
        """Free an adapter that no request uses. Blocks. Raises :class:`ApiError`."""
        self._require_lora_loading()
        adapters.unload(self._scheduler, self.names, name)

    def _require_lora_loading(self) -> None:
        if not self.options.allow_lora_loading:
            raise ApiError(
                403,
                "this server loads no adapters by its API; start it with --allow-lora-loading, or with --lora NAME=DIR",
                code="lora_loading_off",
            )

    def require_running(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is shutting down", retry_after=self.options.drain_timeout)

    def require_ready(self) -> None:
        """Raises :class:`ApiError` (503) if no request would be taken now."""
        self.require_running()
        if self._scheduler is not None and not self._scheduler.ready:
            raise ApiError(503, "no replica is ready", code="no_replica", retry_after=1)

    def require_grammars(self) -> GrammarCompiler:
        """The grammar compiler. Raises :class:`ApiError` (400) if the bundle does not generate text."""
        if self.grammars is None:
            task = self.session.manifest.task
            raise ApiError(400, f"this server's bundle was exported for {task} and does not generate text")
        return self.grammars

    def require_prompt(self, ids: Sequence[int]) -> None:
        """Raises :class:`ApiError` (400) if the prompt is empty or longer than :attr:`prompt_limit`."""
        if len(ids) > self.prompt_limit:
            raise self._too_long(str(len(ids)))
        if not ids:
            raise ApiError(400, "the prompt is empty: it needs at least one token")

    def require_room(self, ids: Sequence[int]) -> None:
        """Raises :class:`ApiError` (400) if the prompt fills the whole context, so that no token can follow."""
        if len(ids) >= self.session.max_seq_len:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, which leaves none to generate: prompt and answer together may have "
                f"{self.session.max_seq_len}",
                code="context_length_exceeded",
            )

    @property
    def prompt_limit(self) -> int:
        """Most tokens of a prompt."""
        longest = self.session.max_seq_len
        return min(self.options.max_prompt_tokens or longest, longest)

    def _too_long(self, tokens: str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {tokens} tokens; this server takes {self.prompt_limit}",
            code="context_length_exceeded",
        )

    async def prepare(self, work: Callable[[], T], slow: bool = False) -> T:
        """Run work that would block the event loop, such as encoding or compiling a grammar, on a thread.

        Args:
            slow: the work may take long. Slow work has its own threads, so that quick work does not wait.
        """
        return await self._lanes.run(work, slow)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The token ids of a prompt. A text that is surely too long is refused before encoding.

        Raises:
            ApiError: the prompt is empty or longer than :attr:`prompt_limit`.
        """
        return self._encoded(text, lambda: self.tokenizer.encode(text, add_special_tokens))

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a conversation's prompt. Raises the errors of :meth:`encode`."""
        return self._encoded(prompt.text, lambda: self.tokenizer.encode_prompt(prompt))

    def _encoded(self, text: str, encode: Callable[[], list[int]]) -> tuple[int, ...]:
        least = self.tokenizer.least_tokens(text)
        if least > self.prompt_limit:
            raise self._too_long(f"at least {least}")
        ids = tuple(encode())
        self.require_prompt(ids)
        return ids

    async def rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt of a conversation, rendered on a thread. Requires that the bundle has a chat template."""
        conversation = self.conversation
        assert conversation is not None
        return await self._lanes.render(lambda: conversation.render(messages, tools, add_generation_prompt))

    def generate(
        self,
        requests: Sequence[Request],
        blocked: Callable[[], bool] = lambda: False,
        trace: Mapping[str, str] = MappingProxyType({}),
    ) -> RunningReplies:
        """Start all requests, or none. Raises the errors of :meth:`Backend.submit`.

        Args:
            blocked: whether the client's connection is full; called on a thread of the backend.
            trace: as in the scheduler's request.
        """
        self.require_running()
        assert self._scheduler is not None
        group = "" if self.options.cache_shared else sharing.group()
        requests = [
            replace(one, id=log.record().get("id", ""), group=group, trace=dict(trace)) for one in requests
        ]
        return RunningReplies(self._scheduler, requests, self.metrics, UnreadOfOne(self._unread, blocked))

    async def pooled(self, work: Callable[[], T], deadline: float) -> T:
        """Run ``work`` (embedding or classification) on the session's only thread, in order of arrival.

        Args:
            deadline: on the clock of ``time.monotonic()``.

        Raises:
            ApiError: the queue is full, or the server shuts down.
            DeadlineError: the work was not done by the deadline.
            RequestError: the bundle generates text.
        """
        self.require_running()
        if self._worker is None:
            raise RequestError("this server's bundle generates text and neither embeds nor classifies")
        if self._waiting >= self.options.max_queue:
            raise ApiError(429, "the queue is full; try again", retry_after=1)
        self._waiting += 1
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                return await asyncio.get_running_loop().run_in_executor(self._worker, work)
        except TimeoutError as error:
            raise DeadlineError("the request was not done by its deadline") from error
        finally:
            self._waiting -= 1


def _local(session: OpenBundle, options: ServerOptions) -> Backend:
    assert isinstance(session, Session)
    for name, folder in options.adapter_folders.items():
        session.load_adapter(name, folder)
    draft = None if options.draft is None else open_draft(session, options.draft)
    store = None if options.cache is None else PrefixStore(options.cache, options.cache_bytes, session)
    return Scheduler(session, max_queue=options.max_queue, store=store, draft=draft)


def _conversation(folder: Path, tokenizer: Tokenizer) -> Conversation | None:
    template = ChatTemplate.of_folder(folder)
    if template is None:
        return None
    require_control_tokens(template, tokenizer)
    return Conversation(template, tokenizer.control_tokens)


def _turn_token(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.id_of(_TURN)
    except RequestError:  # a tokenizer of another family
        return None
