"""The efforts of the three APIs: limits of a thought, refused where the model does not think."""

import httpx
import pytest

MODEL = "glm4-tiny"
WHO = [{"role": "user", "content": "Who are you?"}]
ROUTES = {
    "/v1/chat/completions": lambda effort: {"messages": WHO, "reasoning_effort": effort},
    "/v1/responses": lambda effort: {"input": WHO, "reasoning": {"effort": effort}},
    "/v1/messages": lambda effort: {
        "messages": WHO,
        "max_tokens": 9,
        "output_config": {"effort": effort},
    },
}
PARAMS = {
    "/v1/chat/completions": "reasoning_effort",
    "/v1/responses": "reasoning.effort",
    "/v1/messages": "output_config.effort",
}
DEFAULTS = {"/v1/chat/completions": "medium", "/v1/responses": "medium", "/v1/messages": "high"}


def ask(server, route, effort, **more):
    return httpx.post(server.url + route, json={"model": MODEL} | ROUTES[route](effort) | more)


@pytest.mark.parametrize("route", ROUTES)
def test_an_effort_limits_the_thinking(scripted, thinking_bundle, route):
    limits = {"minimal": 512, "low": 2048, "medium": None, "high": None, "xhigh": None, "max": None}
    scheduler, server, _ = scripted(*[["x", "</think>", "y"]] * len(limits), bundle=thinking_bundle)
    for effort in limits:
        assert ask(server, route, effort).status_code == 200
    masks = [request.mask for request in scheduler.requests]
    assert [mask and mask.grammar.reply.thinking_budget for mask in masks] == list(limits.values())
    refused = ask(server, route, "none")
    assert refused.status_code == 400
    assert f"{PARAMS[route]} is 'none', but this model always thinks" in refused.text


@pytest.mark.parametrize("route", ROUTES)
def test_a_model_that_does_not_think_takes_no_effort(scripted, route):
    scheduler, server, _ = scripted(["x"], ["x"], ["x"])
    assert [ask(server, route, effort).status_code for effort in (None, "none", DEFAULTS[route])] == [200] * 3
    assert [request.mask for request in scheduler.requests] == [None] * 3
    refused = ask(server, route, "low")
    assert refused.status_code == 400
    assert f"{PARAMS[route]} is 'low', but this model does not think; leave the option out" in refused.text
    assert ask(server, route, "lower").status_code == 400


def test_the_lower_limit_holds(scripted, thinking_bundle):
    scheduler, server, _ = scripted(*[["x", "</think>", "y"]] * 3, bundle=thinking_bundle)
    ask(server, "/v1/chat/completions", "low", thinking_budget=100)
    ask(server, "/v1/chat/completions", "low", thinking_budget=9000)
    ask(server, "/v1/messages", "low", thinking={"type": "enabled", "budget_tokens": 100})
    budgets = [request.mask.grammar.reply.thinking_budget for request in scheduler.requests]
    assert budgets == [100, 2048, 100]
