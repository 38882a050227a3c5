"""openai-agents."""

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from steps import API, ASK, BASE, CALLED, KEY, MODEL, WHO, Verdict, get_weather, run

set_tracing_disabled(True)
MODELS = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}


def agent(**given):
    model = MODELS[API](model=MODEL, openai_client=AsyncOpenAI(base_url=BASE, api_key=KEY))
    return Agent(
        name="demo", model=model, model_settings=ModelSettings(temperature=0, max_tokens=200), **given
    )


async def chat():
    return (await Runner.run(agent(), WHO)).final_output


async def stream():
    events = Runner.run_streamed(agent(), WHO).stream_events()
    return [
        event.data.delta
        async for event in events
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
    ]


async def tools():
    answer = await Runner.run(agent(tools=[function_tool(get_weather)]), ASK)
    return [CALLED, answer.final_output]


async def structured():
    return (await Runner.run(agent(output_type=Verdict), WHO)).final_output


run(chat, stream, tools, structured)
