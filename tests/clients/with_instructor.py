"""instructor, in the mode of each API that holds the model to the schema."""

import anthropic
import instructor
import openai
from pydantic import BaseModel
from steps import API, ASK, BASE, CALLED, KEY, MODEL, URL, WHO, Verdict, get_weather, run

MODES = {
    "chat": instructor.Mode.JSON_SCHEMA,
    "responses": instructor.Mode.RESPONSES_TOOLS,
    "messages": instructor.Mode.ANTHROPIC_TOOLS,
}
OPTIONS = {"model": MODEL, "temperature": 0, "max_tokens": 200, "max_retries": 0}


if API == "messages":
    sdk, wrap = anthropic.Anthropic(base_url=URL, api_key=KEY), instructor.from_anthropic
else:
    sdk, wrap = openai.OpenAI(base_url=BASE, api_key=KEY), instructor.from_openai
client = wrap(sdk, mode=MODES[API])


class Weather(BaseModel):
    """The weather of a city today."""

    city: str


def asked(text):
    return [{"role": "user", "content": text}]


def text_of(answer):
    """Of an answer without a form, which instructor passes on as the SDK gives it."""
    return {
        "chat": lambda: answer.choices[0].message.content,
        "responses": lambda: answer.output_text,
        "messages": lambda: answer.content[0].text,
    }[API]()


SEND = {
    "chat": lambda messages: sdk.chat.completions.create(messages=messages, model=MODEL, temperature=0),
    "responses": lambda items: sdk.responses.create(input=items, model=MODEL, temperature=0),
    "messages": lambda messages: sdk.messages.create(
        messages=messages, model=MODEL, max_tokens=200, temperature=0
    ),
}


def with_result(answer, result):
    """The answer with its call, and the call's result, as the next messages of each API."""
    if API == "chat":
        (call,) = answer.choices[0].message.tool_calls
        return [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    if API == "responses":
        (call,) = answer.output
        return [call, {"type": "function_call_output", "call_id": call.call_id, "output": result}]
    (call,) = answer.content
    told = {"type": "tool_result", "tool_use_id": call.id, "content": result}
    return [{"role": "assistant", "content": [call]}, {"role": "user", "content": [told]}]


def chat():
    return text_of(client.chat.completions.create(response_model=None, messages=asked(WHO), **OPTIONS))


def stream():
    pieces = client.chat.completions.create_partial(response_model=Verdict, messages=asked(WHO), **OPTIONS)
    return [str(piece.kind) for piece in pieces]


def tools():
    """The call comes as an object. Its result goes back by the SDK: instructor has no messages for results."""
    calling = wrap(sdk, mode=instructor.Mode.TOOLS) if API == "chat" else client
    create = calling.chat.completions.create_with_completion
    weather, answer = create(response_model=Weather, messages=asked(ASK), **OPTIONS)
    messages = [*asked(ASK), *with_result(answer, get_weather(weather.city))]
    return [CALLED, text_of(SEND[API](messages))]


def structured():
    return client.chat.completions.create(response_model=Verdict, messages=asked(WHO), **OPTIONS)


run(chat, stream, tools, structured)
