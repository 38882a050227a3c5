"""glm4-deploy generate BUNDLE PROMPT"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from glm4_deploy import folders, show, streams
from glm4_deploy.adapters import apply_adapter, run_time_lora_option
from glm4_deploy.commands.text import TEXT_ARGUMENT
from glm4_deploy.draft import draft_option, drafted
from glm4_deploy.prefix_cache import cache_options, opened
from glm4_deploy.stage_place import joined, stage_options
from glm4_runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from glm4_runtime import Session
    from glm4_runtime.generate import Token


@click.command("generate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", type=TEXT_ARGUMENT)
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message, with the chat template.")
@click.option("--system", type=TEXT_ARGUMENT, metavar="TEXT", help="System message. Needs --chat.")
@click.option("--stream", is_flag=True, help="Print the text while it is generated.")
@click.option(
    "--max-tokens",
    type=int,
    default=128,
    show_default=True,
    metavar="N",
    help="Maximum tokens of the output.",
)
@click.option(
    "--temperature",
    type=float,
    help="0 always takes the most likely token. Default for all sampling options: the model's own.",
)
@click.option("--top-p", type=float, help="Sample from the most likely tokens with this total probability.")
@click.option("--top-k", type=int, help="Sample from the K most likely tokens; 0 is off.")
@click.option("--min-p", type=float, help="Exclude tokens below this share of the highest probability.")
@click.option(
    "--repetition-penalty", type=float, help="Above 1: makes tokens of the prompt and output less likely."
)
@click.option("--frequency-penalty", type=float, help="Subtracted per occurrence in the output.")
@click.option("--presence-penalty", type=float, help="Subtracted once if the token is in the output.")
@click.option("--seed", type=int, help="Seed of the sampling. Default: a random one.")
@click.option(
    "--stop",
    type=TEXT_ARGUMENT,
    multiple=True,
    metavar="TEXT",
    help="End before this text. Repeat the option for several.",
)
@click.option("--ignore-eos", is_flag=True, help="Continue after end-of-sequence tokens.")
@run_time_lora_option
@cache_options
@draft_option
@stage_options
@click.option(
    "--provider",
    metavar="NAME",
    help="ONNX Runtime execution provider. Default: the fastest that the bundle supports here.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads. Default: all cores.")
@click.option(
    "--max-seq-len",
    type=int,
    metavar="N",
    help="Maximum tokens of prompt and output, at most the bundle's limit.",
)
@click.option("--verify", is_flag=True, help="Check the SHA-256 of large files completely.")
@click.option("--json", "as_json", is_flag=True, help="Print text, ids, reason and timings as JSON.")
def command(
    bundle: Path,
    prompt: str,
    chat: bool,
    system: str | None,
    stream: bool,
    lora: str | None,
    cache: Path | None,
    cache_bytes: int,
    draft: Path | None,
    stages_on: str,
    ray_address: str | None,
    provider: str | None,
    threads: int | None,
    max_seq_len: int | None,
    verify: bool,
    as_json: bool,
    **sampling: object,
) -> None:
    """Continue PROMPT with BUNDLE; "-" reads it from standard input."""
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat.")
    if stream and as_json:
        raise click.UsageError("--stream and --json exclude each other.")
    folders.require_generator(bundle)
    from glm4_runtime import Session
    from glm4_runtime.defaults import recommended_params

    params = recommended_params(bundle, **sampling)
    text = _standard_input() if prompt == "-" else prompt
    opening = time.monotonic()
    if chat:
        from glm4_runtime.chat_template import start_template_worker

        start_template_worker()
    with (
        joined(stages_on, ray_address),
        Session.open(
            bundle,
            provider=provider,
            threads=threads,
            max_seq_len=max_seq_len,
            max_batch_size=1,
            verify=verify,
            stages_on=stages_on,
        ) as session,
    ):
        apply_adapter(session, lora)
        show.print_warnings(() if as_json else session.warnings)
        ids, ends = _prompt(bundle, session, text, chat, system)
        if not params.ignore_eos:
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
        with (
            opened(session, cache, cache_bytes) as store,
            drafted(session, draft, store) as drafting,
        ):
            generated = (
                drafting.generate(ids, params) if drafting else session.generate(ids, params, store=store)
            )
            start = time.monotonic()
            first = start
            tokens: list[Token] = []
            for token in generated:
                first = first if tokens else time.monotonic()
                tokens.append(token)
                if stream:
                    print(token.text, end="", flush=True)
            end = time.monotonic()
            figures = drafting.figures if drafting else None
    if as_json:
        report = _report(session, ids, tokens, _Times(opening, start, first, end))
        if figures is not None:
            report["drafted_tokens"], report["accepted_tokens"] = figures
        show.print_json(report)
    else:
        print("" if stream else "".join(token.text for token in tokens))


class _Times(NamedTuple):
    """Times in seconds: before the opening, and of the generation its start, first token and end."""

    opening: float
    start: float
    first: float
    end: float


def _report(session: "Session", ids: list[int], tokens: "list[Token]", times: _Times) -> dict[str, Any]:
    """The output of ``--json``."""
    decode, seconds = len(tokens) - 1, times.end - times.first
    return {
        "text": "".join(token.text for token in tokens),
        "token_ids": [token.id for token in tokens],
        "finish_reason": tokens[-1].finish_reason if tokens else None,
        "prompt_tokens": len(ids),
        "provider": session.provider,
        "skipped_providers": session.skipped,
        "warnings": session.warnings,
        "load_seconds": round(times.start - times.opening, 3),
        "first_token_seconds": round(times.first - times.start, 4),
        "tokens_per_second": round(decode / seconds, 2) if decode > 0 and seconds > 0 else None,
    }


def _standard_input() -> str:
    try:
        return streams.text(sys.stdin.read(), sys.stdin.encoding)
    except ValueError as error:
        raise RequestError(f"standard input is not text: {error}") from error


def _prompt(
    bundle: Path, session: "Session", text: str, chat: bool, system: str | None
) -> tuple[list[int], tuple[int, ...]]:
    """The prompt's token ids, and the ids of the tokens that end a turn of the chat."""
    tokenizer = session.tokenizer
    if tokenizer is None:
        raise BundleError(f"{bundle} has no tokenizer.json; add it to the checkpoint and export again")
    if not chat:
        return tokenizer.encode(text), ()
    from glm4_runtime.chat_prompts import ChatPrompts

    messages = [{"role": "system", "content": system}] * (system is not None)
    messages.append({"role": "user", "content": text})
    prompts = ChatPrompts(bundle, tokenizer)
    return prompts.prompt(messages)[1], prompts.ends
