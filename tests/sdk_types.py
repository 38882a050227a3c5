"""Holds what a server sends against the types of an official client: every field known, every value of its type."""

import json

from pydantic import BaseModel, TypeAdapter


def strictly(type_, data):
    """``data`` as an object of an SDK's type, whose fields it has all, and no others."""
    found = TypeAdapter(type_).validate_python(data)
    _require_no_extras(found)
    return found


def _require_no_extras(value):
    if isinstance(value, BaseModel):
        assert not value.model_extra, (type(value).__name__, value.model_extra)
        for name in type(value).model_fields:
            _require_no_extras(getattr(value, name))
    elif isinstance(value, list):
        for member in value:
            _require_no_extras(member)


def events_of(response):
    """The events of a stream: pairs of name (None if unnamed) and data."""
    found = []
    for block in response.text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("event"), json.loads(lines["data"])))
    return found
