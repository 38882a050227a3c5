"""The command line. Each command is a thin layer over a Python function; one table lists all commands."""

import atexit
import contextlib
import os
import sys
from importlib import import_module
from typing import Any

import click

from glm4_deploy import interrupts, streams
from glm4_runtime.errors import Glm4Error, shown

# command -> its module; imported when called, so that --help stays quick
COMMANDS = {
    "export": "glm4_deploy.commands.export",
    "validate": "glm4_deploy.commands.validate",
    "eval": "glm4_deploy.commands.eval",
    "generate": "glm4_deploy.commands.generate",
    "serve": "glm4_deploy.commands.serve",
    "chat": "glm4_deploy.commands.chat",
    "cache": "glm4_deploy.commands.cache",
    "triton": "glm4_deploy.commands.triton",
    "bench": "glm4_deploy.commands.bench",
    "bench-serve": "glm4_deploy.commands.bench_serve",
    "inspect": "glm4_deploy.commands.inspect",
    "doctor": "glm4_deploy.commands.doctor",
}
COMMAND_SUMMARIES = {
    "export": "Make a bundle from a checkpoint, and compare it with PyTorch.",
    "validate": "Measure a bundle's accuracy, and check it against limits.",
    "eval": "Ask bundles the items of tasks, and say which differences are more than chance.",
    "generate": "Continue a prompt with a bundle.",
    "serve": "Serve a bundle with OpenAI's API.",
    "chat": "Chat with a bundle in the terminal.",
    "cache": "List or clear a prefix cache on disk.",
    "triton": "Write a model repository for Triton Inference Server.",
    "bench": "Measure a bundle's speed and memory on this machine.",
    "bench-serve": "Measure a server under load.",
    "inspect": "Describe a checkpoint or a bundle.",
    "doctor": "List what works on this machine, and how to make the rest work.",
}


class _Lazy(click.Group):
    """Lists the commands of the table above, and imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in COMMANDS:
            return None
        from glm4_deploy.examples import epilog  # not needed for --help of the whole

        command: click.Command = import_module(COMMANDS[name]).command
        command.epilog = epilog(name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # otherwise click writes an empty line
            raise click.exceptions.Exit(interrupts.EXIT_CODE) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMAND_SUMMARIES.items()))


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from glm4_deploy import __version__

        click.echo(f"glm4-deploy, version {__version__}")
        ctx.exit()


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """GLM-4-0414 checkpoints to ONNX and TensorRT: exported, proved right, served.

    Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 wrong usage; 3 a limit
    of parity or of a gate is not met; 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point. An error of use becomes one line and an exit code; a bug keeps its traceback.

    Without ``arguments`` it changes streams and signals, and ends the process. With ``arguments`` it leaves streams
    and signals unchanged, and raises SystemExit.
    """
    own = arguments is None
    code = interrupts.EXIT_CODE
    try:
        interrupts.raise_once()
        if own:
            streams.prepare_streams()
        code = _run(arguments)
        interrupts.end(restore=not own)
    except BaseException:  # a library may have turned the KeyboardInterrupt into another exception
        interrupts.end(restore=not own)
        if not interrupts.received():
            raise
    if interrupts.received():
        code = interrupts.EXIT_CODE
        _say("\n" * sys.stderr.isatty() + interrupts.MESSAGE)  # the terminal has written ^C
    code = _flushed(code)
    if own:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> None:
    """End the process at once. Python's own shutdown takes a second with torch, and nothing needs to be freed."""
    atexit._run_exitfuncs()
    os._exit(code)


def _run(arguments: list[str] | None) -> int:
    try:
        status: Any = cli.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        return error.exit_code
    except streams.OutputError as error:
        return _unwritten(error)
    except Glm4Error as error:
        return _refused(error)
    except OSError as error:  # a path that the system refuses: too long, a loop of links, not permitted
        if error.filename is None:
            raise
        path, reason = shown(os.fsdecode(error.filename)), error.strerror
        return _refused(Glm4Error(f"{path} cannot be used: {reason}; choose another path"))
    return status if isinstance(status, int) else 0


def _flushed(code: int) -> int:
    """Flush standard output here, so that an error does not appear at the interpreter's end."""
    try:
        sys.stdout.flush()
    except streams.OutputError as error:
        failed = _unwritten(error)
        return code or failed
    return code


def _unwritten(error: streams.OutputError) -> int:
    streams.discard_output()
    return 0 if error.unread else _refused(error)


def _refused(error: Glm4Error) -> int:
    _say(f"glm4-deploy: {' '.join(str(error).split())}")
    return error.exit_code


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr, flush=True)
