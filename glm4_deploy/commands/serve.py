"""glm4-deploy serve BUNDLE"""

from pathlib import Path
from typing import Any

import click

from glm4_runtime.errors import BundleError


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
    "--served-name", metavar="NAME", help="The model's name in the API; the folder's name by default."
)
@click.option("--max-queue", type=click.IntRange(min=1), default=64, show_default=True, metavar="N")
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), metavar="N", help="The longest prompt.")
@click.option("--max-choices", type=click.IntRange(min=1), default=16, show_default=True, metavar="N")
@click.option(
    "--max-body-bytes", type=click.IntRange(min=1), default=4 * 2**20, show_default=True, metavar="N"
)
@click.option("--request-timeout", type=float, default=600.0, show_default=True, metavar="SECONDS")
@click.option("--body-timeout", type=float, default=30.0, show_default=True, metavar="SECONDS")
@click.option(
    "--drain-timeout",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="What running requests get after SIGTERM.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts and answers to the log, too.")
@click.option("--provider", metavar="NAME", help="An ONNX Runtime execution provider.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; all cores by default.")
@click.option("--max-seq-len", type=int, metavar="N", help="A lower limit than the bundle's.")
@click.option("--max-batch-size", type=int, metavar="N", help="Fewer slots than the bundle's.")
@click.option("--verify", is_flag=True, help="Check every file's SHA-256 first.")
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
    try:
        from glm4_runtime.server import ServerOptions, read_api_keys
        from glm4_runtime.server.run import open_and_serve
    except ModuleNotFoundError as error:
        raise BundleError(f"serving needs {error.name}: pip install 'glm4-deploy[serve,cpu]'") from error
    open_and_serve(
        bundle,
        ServerOptions(api_keys=read_api_keys(api_key_file), **options),
        provider=provider,
        threads=threads,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        verify=verify,
    )
