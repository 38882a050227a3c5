"""glm4-deploy serve BUNDLE"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm4_deploy import folders, hub, interrupts
from glm4_deploy.commands.text import TEXT_ARGUMENT
from glm4_deploy.draft import draft_option
from glm4_deploy.prefix_cache import cache_options
from glm4_deploy.show import shown_progress
from glm4_deploy.stage_place import joined, stages_on_option
from glm4_runtime.errors import BundleError
from glm4_runtime.install import install_command
from glm4_runtime.places import PROCESS, RAY

if TYPE_CHECKING:
    from glm4_runtime.cluster.scaling import ReplicaCount
    from glm4_runtime.server import ServerOptions

_Option = Callable[[Callable[..., None]], Callable[..., None]]


def _seconds(name: str, default: float, words: str) -> _Option:
    return click.option(
        f"--{name}-timeout", type=float, default=default, show_default=True, metavar="SECONDS", help=words
    )


def _replica_count(text: str, shrink_after: float | None) -> "ReplicaCount":
    from glm4_runtime.cluster.scaling import ReplicaCount

    try:
        count = ReplicaCount.parse(text)
    except ValueError as error:
        raise click.UsageError(
            f"--replicas is {text}; give a number such as 4, or the least and the most, such as 1:8"
        ) from error
    if shrink_after is None:
        return count
    if count.fixed:
        raise click.UsageError(f"--shrink-after goes with a range such as --replicas 1:8, not {text}")
    return replace(count, shrink_after=shrink_after)


def _with_adapters(options: "ServerOptions") -> "ServerOptions":
    """The options with the folder of each adapter. An adapter named by its hub repository is downloaded."""
    folders = {name: hub.local_folder(given) for name, given in options.adapter_folders.items()}
    return replace(options, adapters=tuple(f"{name}={folder}" for name, folder in folders.items()))


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--revision", metavar="NAME", help="Branch, tag or commit, if BUNDLE is a name on the hub.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. 0.0.0.0 accepts other machines.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on. 0 chooses a free one.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File of API keys, one per line. The environment variable GLM4_API_KEYS adds more, separated by commas.",
)
@click.option("--allow-anonymous", is_flag=True, help="Accept other machines without an API key.")
@click.option(
    "--served-name",
    type=TEXT_ARGUMENT,
    metavar="NAME",
    help="Name of the model in the API. Default: the name of the folder.",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    type=TEXT_ARGUMENT,
    metavar="ALIAS=NAME",
    help="Further name of the model in the API, such as claude-x=NAME. Repeat the option for several.",
)
@click.option(
    "--lora",
    "adapters",
    multiple=True,
    type=TEXT_ARGUMENT,
    metavar="NAME=DIR",
    help="LoRA adapter as a further model: a folder as PEFT saves it, or a name on the hub. For bundles exported with "
    "--lora-slots. Repeat the option for several.",
)
@click.option(
    "--allow-lora-loading",
    is_flag=True,
    help="Let /v1/load_lora_adapter read adapters from any folder of this machine, and /v1/unload_lora_adapter free them.",
)
@cache_options
@draft_option
@click.option(
    "--cache-shared",
    is_flag=True,
    help="Share prefixes among requests of all API keys, in memory and in --cache. Default: within one key.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Maximum number of replies that wait for a slot.",
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum tokens of a prompt. Default: the model's maximum.",
)
@click.option(
    "--max-choices",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="N",
    help="Maximum number of replies per request.",
)
@click.option(
    "--max-stored",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    metavar="N",
    help="Maximum number of answers of /v1/responses that are kept in memory. 0 keeps none.",
)
@click.option(
    "--max-body-bytes",
    type=click.IntRange(min=1),
    default=4 * 2**20,
    show_default=True,
    metavar="N",
    help="Maximum size of a request's body.",
)
@_seconds("request", 600.0, "Maximum time of a request.")
@_seconds("header", 10.0, "Maximum time for the header of a request.")
@_seconds("body", 30.0, "Maximum time for the body of a request.")
@_seconds("send", 60.0, "Maximum time that a client may leave its answer unread.")
@_seconds("idle", 5.0, "Time before an idle connection is closed. Behind a proxy: longer than the proxy's.")
@_seconds("drain", 30.0, "Time for running requests to finish after SIGTERM.")
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="NAME",
    help="Further host name of this server, such as a proxy's. Repeat the option for several.",
)
@click.option(
    "--allow-origin",
    "allow_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin whose web pages may use this server, such as https://chat.example. Repeat the option for several.",
)
@click.option(
    "--path-prefix",
    default="",
    metavar="PATH",
    help="Path of this server behind a reverse proxy, such as /llm.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning"]),
    default="info",
    show_default=True,
    help="Lowest level in the log. debug includes health probes.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts and answers to the log.")
@click.option(
    "--traces",
    metavar="ENDPOINT",
    help="Send traces to this OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318. env takes the "
    "variables OTEL_EXPORTER_OTLP_... Needs the extra otel. Default: no traces.",
)
@click.option("--trace-prompts", is_flag=True, help="Put prompts and answers into the traces.")
@click.option(
    "--provider",
    metavar="NAME",
    help="ONNX Runtime execution provider. Default: the fastest that the bundle supports here.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads. Default: all cores.")
@click.option(
    "--max-seq-len", type=int, metavar="N", help="Maximum tokens of a sequence, at most the bundle's limit."
)
@click.option(
    "--max-batch-size", type=int, metavar="N", help="Maximum number of sequences, at most the bundle's limit."
)
@click.option(
    "--replicas",
    metavar="N",
    help="Serve by N replicas on a Ray cluster, or by 1:8, a number that follows the load. Needs the extra ray.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Running Ray cluster to join, such as auto or 10.0.0.1:6379. Default: start one on this machine.",
)
@click.option(
    "--step-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="With --replicas: maximum time of one step of the model. A slower replica is replaced. Default: 300.",
)
@click.option(
    "--shrink-after",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="With --replicas 1:8: time of lower load after which replicas end. Default: 300.",
)
@stages_on_option(
    None,
    "Where the stages of a bundle with --stages run: in one process, or on ray's nodes. Default: ray with --replicas, "
    "else process.",
)
@click.option("--verify", is_flag=True, help="Check the SHA-256 of large files completely.")
def command(
    bundle: Path,
    revision: str | None,
    api_key_file: Path | None,
    provider: str | None,
    threads: int | None,
    max_seq_len: int | None,
    max_batch_size: int | None,
    verify: bool,
    replicas: str | None,
    ray_address: str | None,
    step_timeout: float | None,
    shrink_after: float | None,
    stages_on: str | None,
    **options: Any,
) -> None:
    """Serve BUNDLE with OpenAI's and Anthropic's APIs, and with a chat page at /, until SIGTERM or Ctrl-C.

    BUNDLE is a folder, or a name on the hub of a repository that holds a bundle.
    """
    for name, value in (("--step-timeout", step_timeout), ("--shrink-after", shrink_after)):
        if value is not None and replicas is None:
            raise click.UsageError(f"{name} goes with --replicas")
    if ray_address is not None and replicas is None and stages_on != RAY:
        raise click.UsageError(f"--ray-address goes with --replicas or with --stages-on {RAY}")
    if options["draft"] is not None and (replicas is not None or stages_on == RAY):
        raise click.UsageError("--draft serves from one process; leave out --replicas and --stages-on ray")
    count = None if replicas is None else _replica_count(replicas, shrink_after)
    with interrupts.exiting():  # until requests are taken; then the server answers signals
        try:
            from glm4_runtime.server import ServerOptions, read_api_keys
            from glm4_runtime.server.run import open_and_serve
        except ModuleNotFoundError as error:
            raise BundleError(f"serving needs {error.name}; run {install_command('serve', 'cpu')}") from error
        if hub.is_hub_name(bundle):  # the folder of a download is named after its commit
            options["served_name"] = options["served_name"] or bundle.name
        chosen = ServerOptions(api_keys=read_api_keys(api_key_file), **options)
        with shown_progress() as progress:
            bundle = hub.local_bundle(bundle, revision, progress)
        if bundle.exists():  # a taken port is told first
            folders.require_bundle(bundle)
        if chosen.draft is not None:
            folders.require_generator(chosen.draft)
        chosen = _with_adapters(chosen)
        session = {
            "provider": provider,
            "threads": threads,
            "max_seq_len": max_seq_len,
            "max_batch_size": max_batch_size,
            "verify": verify,
        }
        if count is None:
            place = stages_on or PROCESS
            with joined(place, ray_address):
                open_and_serve(bundle, chosen, stages_on=place, **session)
            return
        session["stages_on"] = stages_on
        from glm4_runtime.cluster.serve import ClusterOptions, serve_replicas

        serve_replicas(
            bundle,
            chosen,
            ClusterOptions(count, ray_address, step_timeout or ClusterOptions.step_timeout, session),
        )
