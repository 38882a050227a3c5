"""pydantic-ai's agents."""

from anthropic import AsyncAnthropic
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from steps import API, ASK, BASE, CALLED, KEY, MODEL, URL, WHO, Verdict, get_weather, run

MODELS = {
    "chat": lambda: OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key=KEY)),
    "responses": lambda: OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key=KEY)),
    "messages": lambda: AnthropicModel(
        MODEL, provider=AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=URL, api_key=KEY))
    ),
}
model = MODELS[API]()
settings = {"temperature": 0, "max_tokens": 200}


def chat():
    return Agent(model, model_settings=settings).run_sync(WHO).output


async def stream():
    async with Agent(model, model_settings=settings).run_stream(WHO) as answer:
        return [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]


def tools():
    answer = Agent(model, model_settings=settings, tools=[get_weather]).run_sync(ASK)
    return [CALLED, answer.output]


def structured():
    """By a tool, which is pydantic-ai's own way, and by the API's."""
    agents = (
        Agent(model, model_settings=settings, output_type=form) for form in (Verdict, NativeOutput(Verdict))
    )
    return [agent.run_sync(WHO).output for agent in agents][-1]


run(chat, stream, tools, structured)
