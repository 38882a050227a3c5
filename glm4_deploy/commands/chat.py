"""glm4-deploy chat BUNDLE"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glm4_deploy import folders, interrupts, show, streams
from glm4_deploy.adapters import apply_adapter, run_time_lora_option
from glm4_deploy.commands.text import TEXT_ARGUMENT
from glm4_deploy.draft import draft_option, drafted
from glm4_deploy.prefix_cache import cache_options, opened
from glm4_deploy.stage_place import joined, stage_options
from glm4_deploy.typed import is_command, message_reader
from glm4_runtime.errors import RequestError

if TYPE_CHECKING:
    from glm4_runtime.dialogue import Dialogue

_HELP = (
    "/new starts over, /help shows this line, /exit or Ctrl-D ends. Ctrl-C stops an answer. "
    "Alt+Enter breaks the line; pasted lines are one message."
)
_THOUGHT, _PLAIN = "\x1b[2m", "\x1b[0m"


@click.command("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", type=TEXT_ARGUMENT, metavar="TEXT", help="System message.")
@click.option(
    "--max-tokens", type=int, metavar="N", help="Maximum tokens of an answer. Default: as many as fit."
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
    "--repetition-penalty", type=float, help="Above 1: makes tokens of the conversation less likely."
)
@click.option("--seed", type=int, help="Seed of the sampling. Default: a random one.")
@click.option("--hide-thoughts", is_flag=True, help="Hide the thinking.")
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
    help="Maximum tokens of the conversation, at most the bundle's limit.",
)
def command(
    bundle: Path,
    system: str | None,
    hide_thoughts: bool,
    lora: str | None,
    cache: Path | None,
    cache_bytes: int,
    draft: Path | None,
    stages_on: str,
    ray_address: str | None,
    provider: str | None,
    threads: int | None,
    max_seq_len: int | None,
    **sampling: object,
) -> None:
    """Talk with BUNDLE in the terminal.

    Commands: /new starts a new conversation, /help lists the commands, /exit or Ctrl-D ends. Ctrl-C stops an answer.
    From a pipe, each line is a message.
    """
    folders.require_generator(bundle)
    from glm4_runtime import Session
    from glm4_runtime.chat_template import start_template_worker
    from glm4_runtime.defaults import recommended_params
    from glm4_runtime.dialogue import Dialogue

    start_template_worker()
    params = recommended_params(bundle, **sampling)
    with (
        joined(stages_on, ray_address),
        Session.open(
            bundle,
            provider=provider,
            threads=threads,
            max_seq_len=max_seq_len,
            max_batch_size=1,
            stages_on=stages_on,
        ) as session,
    ):
        apply_adapter(session, lora)
        show.print_warnings(session.warnings)
        with (
            opened(session, cache, cache_bytes) as store,
            drafted(session, draft, store) as drafting,
        ):
            dialogue = Dialogue(session, params, system, store, drafting)
            if sys.stdin.isatty():
                click.echo(_HELP, err=True)
            _talk(dialogue, hide_thoughts)


def _talk(dialogue: "Dialogue", hide_thoughts: bool) -> None:
    read = message_reader()
    while (message := read()) is not None:
        command = message.strip() if is_command(message) else None
        if command == "/exit":
            break
        if command == "/new":
            dialogue.forget()
        elif command == "/help":
            click.echo(_HELP, err=True)
        elif command is not None:
            click.echo(
                f"glm4-deploy: there is no command {command}; there are /new, /help and /exit. "
                "To send this as a message, put a space in front",
                err=True,
            )
        elif message.strip():
            try:
                text = streams.text(message.strip(), sys.stdin.encoding)
            except ValueError as error:
                click.echo(f"glm4-deploy: the line is not text: {error}", err=True)
            else:
                _answer(dialogue, text, hide_thoughts)


def _answer(dialogue: "Dialogue", text: str, hide_thoughts: bool) -> None:
    start = time.monotonic()
    first = start
    count = 0
    pieces = dialogue.say(text)
    try:
        for piece in pieces:
            count += 1
            first = first if count > 1 else time.monotonic()
            if piece.thought and not hide_thoughts:
                click.echo(f"{_THOUGHT}{piece.thought}{_PLAIN}", nl=False)
            click.echo(piece.answer, nl=False)
            sys.stdout.flush()
        click.echo()
    except KeyboardInterrupt:
        interrupts.forgive()
        click.echo(" (stopped)")
    except RequestError as error:
        click.echo(f"glm4-deploy: {error}", err=True)
        return
    finally:
        pieces.close()
    seconds = time.monotonic() - first
    if sys.stderr.isatty() and count > 1:
        click.echo(
            f"{(count - 1) / seconds:.1f} tokens/s, {count} tokens, first after {first - start:.2f} s, "
            f"prompt {dialogue.prompt_tokens} ({dialogue.cached_tokens} cached)",
            err=True,
        )
