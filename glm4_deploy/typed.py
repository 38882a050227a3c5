"""Reads messages from a terminal or a pipe, one after the other; None at the end."""

import re
import sys
from collections.abc import Callable

import click

# A command is a slash and one word. "/etc/hosts is ..." and " /new" are messages.
_COMMAND = re.compile(r"/[A-Za-z?]+\s*")


def is_command(message: str) -> bool:
    return _COMMAND.fullmatch(message) is not None


def message_reader() -> Callable[[], str | None]:
    """A function that returns the next message.

    In a terminal, pasted lines are one message, Alt+Enter breaks the line, and arrow keys find earlier messages.
    From a pipe, each line is a message.
    """
    return _from_terminal() if sys.stdin.isatty() else _from_pipe


def _from_pipe() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _from_terminal() -> Callable[[], str | None]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession("> ", key_bindings=keys, prompt_continuation="  ")

    def read() -> str | None:
        try:
            return session.prompt()
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return None

    return read
