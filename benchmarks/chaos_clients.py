"""Clients of every kind: streams, schemas, tools, sampling, penalties, stop strings, log-probabilities, n > 1.

python -m benchmarks.chaos_clients URL --out ANSWERS.json                   # each question once
python -m benchmarks.chaos_clients URL --compare ANSWERS.json --seconds 600 --out FOUND.json
"""

import hashlib
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import openai

_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": _PERSON}}
_SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
# kind of question -> further members of the body
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": _SAMPLED,
    "penalties": _SAMPLED | {"frequency_penalty": 0.5, "extra_body": {"repetition_penalty": 1.1}},
    "log-probabilities": _SAMPLED | {"logprobs": True, "top_logprobs": 3},
    "n": _SAMPLED | {"n": 2},
    "stop strings": _SAMPLED | {"stop": ["e t", "never to be seen"]},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _PERSON}}},
    "tool": {"tools": [_TOOL], "tool_choice": "required"},
}
# Questions: each kind with so many prompts, once streamed and once whole.
PROMPTS = 10
_MOST_SHOWN = 5


Question = tuple[str, int, bool]


def questions(prompts: int = PROMPTS) -> list[Question]:
    """Kind, number of the prompt, and whether the answer is streamed."""
    return [
        (kind, prompt, streamed) for prompt in range(prompts) for kind in KINDS for streamed in (False, True)
    ]


def ask(client: openai.OpenAI, model: str, kind: str, prompt: int, streamed: bool) -> Any:
    """The answer as plain data, without ids and times; all that a client sees otherwise."""
    words = " and of the queen who sailed around the world" * (prompt % 3 * 3)
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me story number {prompt} of the old king{words}."}],
        "max_tokens": 48,
    } | KINDS[kind]
    if not streamed:
        whole = client.chat.completions.create(**body)
        return json.loads(json.dumps([_without_ids(whole.model_dump()["choices"]), _counts(whole.usage)]))
    texts: dict[str, list[Any]] = {}
    usage = None
    for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            _add(texts.setdefault(str(choice.index), ["", "", []]), choice)
    return json.loads(json.dumps([texts, _counts(usage)]))


def _add(found: list[Any], choice: Any) -> None:
    """Join the deltas, because where the text is cut depends on time."""
    found[0] += choice.delta.content or ""
    for call in choice.delta.tool_calls or ():
        found[1] += f"{call.function.name or ''}{call.function.arguments or ''}"
    if choice.logprobs:
        found[2] += choice.logprobs.model_dump()["content"] or []
    if choice.finish_reason:
        found.append(choice.finish_reason)


def _without_ids(choices: list[Any]) -> list[Any]:
    for choice in choices:
        for call in choice["message"].get("tool_calls") or ():
            del call["id"]
    return choices


def _counts(usage: Any) -> list[int]:
    return [usage.prompt_tokens, usage.completion_tokens]


class Clients:
    """Threads that ask, and compare each answer with the wanted one.

    Attributes:
        outcomes: equal, altered or lost -> count. ``shown``: the first of what was altered or lost.
    """

    def __init__(self, url: str, wanted: dict[str, Any]) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._model = self._client.models.list().data[0].id
        self._wanted, self._questions = wanted, questions()
        self._lock = threading.Lock()
        self._next = 0
        self.outcomes: Counter[str] = Counter()
        self.shown: list[str] = []
        self.slowest = 0.0

    def answers(self, threads: int) -> dict[str, Any]:
        """The answer to each question."""
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda one: ask(self._client, self._model, *one), self._questions)
            return {repr(one): answer for one, answer in zip(self._questions, found, strict=True)}

    def run(self, threads: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(self._ask_until, end) for _ in range(threads)]:
                done.result()

    def _ask_until(self, end: float) -> None:
        while time.monotonic() < end:
            with self._lock:
                question = self._questions[self._next % len(self._questions)]
                self._next += 1
            began = time.monotonic()
            try:
                found = ask(self._client, self._model, *question)
                outcome, shown = "equal", ""
                if found != self._wanted[repr(question)]:
                    outcome, shown = "altered", f"{found} for {self._wanted[repr(question)]}"
            except openai.APIError as error:
                outcome, shown = "lost", f"{type(error).__name__}: {error}"
            self._note(outcome, f"{outcome}: {question}: {shown}", time.monotonic() - began)

    def _note(self, outcome: str, shown: str, seconds: float) -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            self.slowest = max(self.slowest, seconds)
            if outcome != "equal" and len(self.shown) < _MOST_SHOWN:
                self.shown.append(shown[:1000])


def digest(answers: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(answers, sort_keys=True).encode()).hexdigest()


@click.command(help=__doc__.partition("\n")[0])
@click.argument("url")
@click.option("--compare", type=click.Path(path_type=Path), help="Wanted answers. None: write the answers.")
@click.option("--seconds", default=60.0, show_default=True)
@click.option("--clients", default=32, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(url: str, compare: Path | None, seconds: float, clients: int, out: Path) -> None:
    asking = Clients(url, json.loads(compare.read_text()) if compare else {})
    if compare is None:
        out.write_text(json.dumps(asking.answers(4)))
        return
    asking.run(clients, seconds)
    found = {"equal": 0, "altered": 0, "lost": 0} | asking.outcomes
    out.write_text(json.dumps(found | {"slowest_seconds": round(asking.slowest, 2), "shown": asking.shown}))


if __name__ == "__main__":
    main()
