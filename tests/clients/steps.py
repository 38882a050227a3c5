"""What each client's script does: four steps, whose results are printed as one JSON object.

A script is called with the server's address, the model's name and the API: chat, responses or messages (Anthropic's).
"""

import asyncio
import inspect
import json
import sys
import traceback
from typing import Literal

from pydantic import BaseModel

URL, MODEL, API = sys.argv[1:4]
BASE = f"{URL}/v1"
KEY = "none"
WHO = "Who are you?"
ASK = "What is the weather in Oslo?"
WEATHER = '{"sky": "clear", "celsius": 18}'
CALLED: list[str] = []


class Rival(BaseModel):
    kind: Literal["bear", "wolf"]


class Verdict(BaseModel):
    """The form of a structured answer. Its members are bounded, as the demo model would not end a text by itself."""

    kind: Literal["raven", "whale"]
    sure: bool
    age: Literal[1, 2, 3]
    rival: Rival
    mark: Literal["old", "new"] | None = None


def get_weather(city: str) -> str:
    """The weather of a city today."""
    CALLED.append(city)
    return WEATHER


def run(chat, stream, tools, structured):
    """Do the steps; print ``{"chat": ..., "stream": [pieces], "tools": [cities, text], "structured": {...}}``."""
    given = {}
    for step in (chat, stream, tools, structured):
        try:
            given[step.__name__] = _done(step())
        except Exception:
            given[step.__name__] = {"error": traceback.format_exc()[-3000:]}
    print(json.dumps(given))


def _done(result):
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    return result.model_dump() if isinstance(result, BaseModel) else result
