"""The worker that renders chat templates, in Jinja's sandbox.

A task is {sources: {name: template}, name, variables}; ``name`` null only compiles them. The answer is one of
{text}, {refused}: the template's own words, {failed}: what went wrong in it, {invalid: {name, line, reason}}.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm4_runtime.workers import child

# Number of compiled templates to keep.
_MOST_KEPT = 8
_LONGEST_REASON = 300


def main(limits: str) -> None:
    child.answer_tasks(Templates().answer, limits)


class Templates:
    """Compiles templates, remembers the last ones, and renders them."""

    def __init__(self) -> None:
        self._environment = _environment()
        self._compiled: dict[str, Template] = {}

    def answer(self, task: Mapping[str, Any]) -> dict[str, Any]:
        for name, source in task["sources"].items():
            try:
                self._template(source)
            except MemoryError:
                raise
            except Exception as error:  # constant folding may raise any exception
                line = error.lineno if isinstance(error, TemplateSyntaxError) else 1
                return {"invalid": {"name": name, "line": line, "reason": _one_line(error)}}
        if task["name"] is None:
            return {}
        try:
            return {"text": self._template(task["sources"][task["name"]]).render(task["variables"])}
        except MemoryError:
            raise
        except TemplateError as error:
            return {"refused": _one_line(error)}
        except Exception as error:  # untrusted code may raise any exception
            return {"failed": f"{type(error).__name__}: {_one_line(error)}"}

    def _template(self, source: str) -> Template:
        if source not in self._compiled:
            while len(self._compiled) >= _MOST_KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[source] = self._environment.from_string(source)
        return self._compiled[source]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error)[: 2 * _LONGEST_REASON].split())
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def _environment() -> ImmutableSandboxedEnvironment:
    """The settings, filters and functions that chat templates expect from every server."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's text for training. A prompt needs only the text inside."""

    tags = {"generation"}  # noqa: RUF012  declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. Jinja's own filter escapes for HTML and sorts the keys, unlike the models' training data."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
