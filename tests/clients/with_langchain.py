"""LangChain, and LangGraph's agent."""

from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from steps import API, ASK, BASE, CALLED, KEY, MODEL, URL, WHO, Verdict, get_weather, run

if API == "messages":
    model = ChatAnthropic(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=200)
else:
    model = ChatOpenAI(
        model=MODEL,
        base_url=BASE,
        api_key=KEY,
        temperature=0,
        max_tokens=200,
        use_responses_api=API == "responses",
    )


def text_of(message):
    return message.text if isinstance(message.text, str) else message.text()


def chat():
    return text_of(model.invoke(WHO))


def stream():
    return [text_of(piece) for piece in model.stream(WHO)]


def tools():
    agent = create_react_agent(model, [tool(get_weather)])
    last = agent.invoke({"messages": [("user", ASK)]})["messages"][-1]
    return [CALLED, text_of(last)]


def structured():
    return model.with_structured_output(Verdict, method="json_schema").invoke(WHO)


run(chat, stream, tools, structured)
