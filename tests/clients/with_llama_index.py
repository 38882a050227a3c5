"""LlamaIndex, and its function agent."""

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.anthropic import Anthropic
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from steps import API, ASK, BASE, CALLED, KEY, MODEL, URL, WHO, Verdict, get_weather, run

LIKE = {
    "is_chat_model": True,
    "is_function_calling_model": True,
    "should_use_structured_outputs": True,
    "context_window": 1024,
}
MODELS = {
    "chat": lambda: OpenAILike(
        model=MODEL, api_base=BASE, api_key=KEY, temperature=0, max_tokens=200, **LIKE
    ),
    "responses": lambda: OpenAIResponses(
        model=MODEL, api_base=BASE, api_key=KEY, temperature=0, max_output_tokens=200
    ),
    "messages": lambda: Anthropic(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=200),
}
model = MODELS[API]()
question = [ChatMessage(role="user", content=WHO)]


def chat():
    return model.chat(question).message.content


def stream():
    return [piece.delta for piece in model.stream_chat(question)]


async def tools():
    answer = await FunctionAgent(tools=[get_weather], llm=model).run(ASK)
    return [CALLED, str(answer)]


def structured():
    return model.as_structured_llm(Verdict).chat(question).raw


run(chat, stream, tools, structured)
