"""Text as an option's value, in any encoding of the terminal."""

import click

from glm4_deploy import streams


class TextType(click.ParamType):  # type: ignore[type-arg]
    """An argument that is text and no file name, decoded in the locale's encoding or as UTF-8."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return streams.text(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


TEXT_ARGUMENT = TextType()
