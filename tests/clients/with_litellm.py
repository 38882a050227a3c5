"""LiteLLM: one function for many servers, here by OpenAI's and Anthropic's APIs."""

import json

import litellm
from steps import API, ASK, BASE, CALLED, KEY, MODEL, URL, WHO, Verdict, get_weather, run

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": get_weather.__doc__,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SERVERS = {
    "chat": {"model": f"openai/{MODEL}", "base_url": BASE},
    "responses": {"model": f"openai/responses/{MODEL}", "base_url": BASE},
    "messages": {"model": f"anthropic/{MODEL}", "base_url": URL},
}


def complete(messages, **options):
    return litellm.completion(
        messages=messages, api_key=KEY, temperature=0, max_tokens=200, **SERVERS[API], **options
    )


def asked(text):
    return [{"role": "user", "content": text}]


def chat():
    return complete(asked(WHO)).choices[0].message.content


def stream():
    return [piece.choices[0].delta.content or "" for piece in complete(asked(WHO), stream=True)]


def tools():
    first = complete(asked(ASK), tools=[TOOL], tool_choice="auto").choices[0].message
    (call,) = first.tool_calls
    result = get_weather(**json.loads(call.function.arguments))
    told = {"role": "tool", "tool_call_id": call.id, "content": result}
    return [CALLED, complete([*asked(ASK), first, told], tools=[TOOL]).choices[0].message.content]


def structured():
    answer = complete(asked(WHO), response_format=Verdict).choices[0].message.content
    return Verdict.model_validate_json(answer)


run(chat, stream, tools, structured)
