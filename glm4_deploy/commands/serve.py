"""glm4-deploy serve BUNDLE"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from glm4_deploy import folders, interrupts
from glm4_deploy.commands.text import TEXT
from glm4_runtime.errors import BundleError

Command = Callable[..., None]


def _seconds(name: str, default: float, words: str) -> Callable[[Command], Command]:
    return click.option(
        f"--{name}-timeout", type=float, default=default, show_default=True, metavar="SECONDS", help=words
    )


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for everywhere."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="API keys, one a line. GLM4_API_KEYS in the environment adds more, separated by commas.",
)
@click.option("--allow-anonymous", is_flag=True, help="Listen beyond this machine without an API key.")
@click.option(
    "--served-name",
    type=TEXT,
    metavar="NAME",
    help="The model's name in the API; the folder's name by default.",
)
@click.option("--max-queue", type=click.IntRange(min=1), default=64, show_default=True, metavar="N")
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), metavar="N", help="The longest prompt.")
@click.option("--max-choices", type=click.IntRange(min=1), default=16, show_default=True, metavar="N")
@click.option(
    "--max-body-bytes", type=click.IntRange(min=1), default=4 * 2**20, show_default=True, metavar="N"
)
@_seconds("request", 600.0, "Ends a request that takes longer.")
@_seconds("header", 10.0, "Ends a connection whose request has not begun, or has half a header.")
@_seconds("body", 30.0, "Ends a request whose body takes longer to arrive.")
@_seconds("send", 60.0, "Ends a connection whose client does not read its answer.")
@_seconds("idle", 5.0, "Ends a connection without another request; behind a proxy, longer than the proxy's.")
@_seconds("drain", 30.0, "What running requests get after SIGTERM.")
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="Another name that this server may be called by, such as a proxy's; may be given several times.",
)
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    metavar="ORIGIN",
    help="An origin whose web pages may use this server, such as https://chat.example; may be given several times.",
)
@click.option(
    "--path-prefix", default="", metavar="PATH", help="Where a reverse proxy shows this server, as /llm."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning"]),
    default="info",
    show_default=True,
    help="debug also logs health probes.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts and answers to the log, too.")
@click.option("--provider", metavar="NAME", help="An ONNX Runtime execution provider.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
@click.option("--max-seq-len", type=int, metavar="N", help="A lower limit than the bundle's.")
@click.option("--max-batch-size", type=int, metavar="N", help="Fewer slots than the bundle's.")
@click.option("--verify", is_flag=True, help="Hash large files whole, too.")
def command(
    bundle: Path,
    api_key_file: Path | None,
    provider: str | None,
    threads: int | None,
    max_seq_len: int | None,
    max_batch_size: int | None,
    verify: bool,
    **options: Any,
) -> None:
    """Serve BUNDLE by OpenAI's API, with a chat page at /, until SIGTERM or Ctrl-C."""
    with interrupts.exiting():  # until requests are taken; then the server answers signals
        try:
            from glm4_runtime.server import ServerOptions, read_api_keys
            from glm4_runtime.server.run import open_and_serve
        except ModuleNotFoundError as error:
            raise BundleError(f"serving needs {error.name}: pip install 'glm4-deploy[serve,cpu]'") from error
        chosen = ServerOptions(api_keys=read_api_keys(api_key_file), **options)
        if bundle.exists():  # a taken port is told first
            folders.require_bundle(bundle)
        open_and_serve(
            bundle,
            chosen,
            provider=provider,
            threads=threads,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            verify=verify,
        )
