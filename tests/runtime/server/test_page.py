"""The page at /, in a real headless Chromium where there is one."""

import json
import math
import re

import httpx
import pytest
from chat_page import answer, answered, say, talk_twice

from glm4_runtime.server.page import whole_page

PAGE = whole_page()
TOOLS = [{"type": "function", "function": {"name": "get_time"}}]
THOUGHT = ["\nLet", " me see.", "</think>", "\n\nIt is", " <b>noon</b>."]


def test_the_page_needs_nothing_from_elsewhere(server):
    response = httpx.get(server.url)
    assert response.text == PAGE
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?://[a-z]|[\"'(]//[a-z]|@import|url\(|innerHTML", PAGE)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def contents(scheduler, index, bundle):
    """The prompt of a request as text."""
    from glm4_runtime.tokenizer import Tokenizer

    return Tokenizer.from_folder(bundle).decode(
        scheduler.requests[index].prompt_ids, skip_special_tokens=False
    )


def test_an_answer_comes_with_its_speed(opened, server):
    page = opened(server)
    page.get_by_role("heading", name="glm4-tiny").wait_for()
    page.click("#more summary")
    page.fill("#temperature", "0")
    # the server's figures, not what the page measures itself
    page.evaluate(
        "() => { const take = Answer.prototype.take;"
        "Answer.prototype.take = function (chunk) { window.told = chunk.timings; take.call(this, chunk); } }"
    )
    say(page, "Who are you?")
    answered(page)
    assert page.locator(".user > .text").inner_text() == "Who are you?"
    assert answer(page).startswith("I am glm4-tiny, a very small model")
    timings = page.evaluate("window.told")
    told = f"{timings['tokens_per_second']:.1f} tokens/s · 34 tokens · first after "
    told += f"{math.floor(timings['first_token_seconds'] * 1000 + 0.5)} ms · prompt 9"
    assert page.locator(".figures").inner_text().startswith(told)
    say(page, "Hello")
    answered(page, 2)
    page.click("#new")
    assert page.locator(".turn").count() == 0


def test_thoughts_are_folded_and_stay_out_of_the_next_request(opened, scripted, thinking_bundle):
    scheduler, server, _ = scripted(THOUGHT, ["\nx"], bundle=thinking_bundle)
    page = opened(server)
    say(page, "When?")
    answered(page)
    assert answer(page) == "It is <b>noon</b>."
    thought = page.locator("details.thought")
    assert thought.get_attribute("open") is None
    assert not thought.locator("div").is_visible()
    thought.locator("summary").click()
    assert thought.inner_text() == "Thought\nLet me see."
    say(page, "Sure?")
    answered(page, 2)
    prompt = contents(scheduler, 1, thinking_bundle)
    assert "Let me see" not in prompt
    assert "It is <b>noon</b>." in prompt


def test_a_call_is_folded_and_asks_for_its_result(opened, scripted):
    scheduler, server, _ = scripted(["get_time\n", '{"city": ', '"Oslo"}'], ["\nNoon."])
    page = opened(server)
    page.click("#more summary")
    page.fill("#tools", json.dumps(TOOLS))
    say(page, "What time is it?")
    answered(page)
    call = page.locator("details.call")
    assert not call.locator("div").is_visible()
    call.locator("summary").click()
    assert call.inner_text() == 'Calls get_time {"city": "Oslo"}\n{"city": "Oslo"}'
    assert page.get_attribute("#say", "placeholder") == 'Result of get_time {"city": "Oslo"}'
    say(page, "12:00")
    answered(page, 2)
    assert answer(page, 1) == "Noon."
    assert page.locator("details.result summary").inner_text() == 'Result of get_time {"city": "Oslo"}'
    assert len(scheduler.requests[1].prompt_ids) > len(scheduler.requests[0].prompt_ids)


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_an_answer_can_be_stopped(opened, scripted, way):
    scheduler, server, _ = scripted(["\nHe", "llo", None, "never"])
    page = opened(server)
    say(page, "Hi")
    page.locator(".assistant").get_by_text("Hello", exact=True).wait_for()
    page.get_by_role("button", name="Stop").click() if way == "button" else page.keyboard.press("Escape")
    page.locator(".assistant").get_by_text("Stopped.").wait_for()
    assert scheduler.tickets[0].cancelled.wait(5)
    assert page.get_by_role("button", name="Send").is_visible()


def test_a_key_is_asked_for(opened, scripted, complaints):
    _, server, _ = scripted(["\nyes"], api_keys=("secret",))
    page = opened(server)
    page.get_by_text("a valid API key is needed").wait_for()
    page.fill("#key", "secret")
    say(page, "Hi")
    page.locator(".assistant").get_by_text("yes", exact=True).wait_for()
    assert not page.locator("#problem").is_visible()
    complaints.clear()  # of the 401


def test_a_refused_message_comes_back(opened, scripted, demo_bundle, complaints):
    scheduler, server, _ = scripted(["\nfirst"], ["\nsecond"], max_prompt_tokens=60)
    page = opened(server)
    say(page, "Hi")
    answered(page)
    say(page, "far too long " * 60)
    page.locator("#problem").get_by_text("the prompt has").wait_for()
    assert page.locator(".turn").count() == 2  # the refused message is not part of the conversation
    assert page.input_value("#say") == "far too long " * 60
    say(page, "short")
    answered(page, 2)
    assert not page.locator("#problem").is_visible()
    assert "far too long" not in contents(scheduler, 1, demo_bundle)
    complaints.clear()  # of the 400


def test_a_dead_server_is_said_in_words(opened, scripted, complaints):
    _, server, _ = scripted(["\nx"])
    page = opened(server)
    page.get_by_role("heading", name="glm4-tiny").wait_for()
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    say(page, "Hi")
    page.locator("#problem").get_by_text("The server does not answer.").wait_for()
    assert page.input_value("#say") == "Hi"
    assert page.locator(".turn").count() == 0
    complaints.clear()  # of the refused connection


def test_a_message_can_be_edited_and_an_answer_regenerated(opened, scripted, demo_bundle):
    scheduler, server, _ = scripted(["\none"], ["\ntwo"], ["\nthree"], ["\nfour"])
    page = opened(server)
    say(page, "alpha")
    answered(page)
    say(page, "beta")
    answered(page, 2)
    page.get_by_role("button", name="Regenerate").nth(1).click()
    page.locator(".assistant").get_by_text("three", exact=True).wait_for()
    assert scheduler.requests[2].prompt_ids == scheduler.requests[1].prompt_ids
    page.get_by_role("button", name="Edit").first.click()
    page.fill("textarea[aria-label='Edit the message']", "gamma")
    page.locator(".user form").get_by_role("button", name="Send").click()
    page.locator(".assistant").get_by_text("four", exact=True).wait_for()
    answered(page)
    assert page.locator(".turn").count() == 2
    prompt = contents(scheduler, 3, demo_bundle)
    assert "gamma" in prompt
    assert "alpha" not in prompt


def test_conversations_stay_in_the_browser(opened, scripted):
    _, server, _ = scripted(["\none"], ["\ntwo"])
    page = opened(server)
    talk_twice(page)
    page.reload()
    assert page.locator("#list .open").all_inner_texts() == ["second talk", "first talk"]
    assert answer(page) == "two"
    page.get_by_role("button", name="first talk", exact=True).click()
    assert answer(page) == "one"
    page.get_by_role("button", name="Delete “first talk”").click()
    assert page.locator("#list .open").all_inner_texts() == ["second talk"]
    assert page.locator(".turn").count() == 0
    page.reload()
    assert page.locator("#list .open").all_inner_texts() == ["second talk"]


def test_a_store_that_is_spoilt_or_forbidden_stops_nothing(opened, scripted):
    _, server, _ = scripted(["\nfine"])
    page = opened(server)
    page.evaluate("localStorage.setItem(STORE, '[{\"messages\": 3}, null, 7]')")
    page.reload()
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    say(page, "Hi")
    answered(page)
    assert answer(page) == "fine"


def test_copies_hold_the_source(opened, scripted):
    _, server, _ = scripted(["\n**x**\n```py\n", "a = 1\n\nb\n```"])
    page = opened(server)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    say(page, "Hi")
    answered(page)
    page.locator(".assistant .acts").get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "**x**\n```py\na = 1\n\nb\n```"
    page.locator(".code").get_by_role("button", name="Copy").click()
    page.locator(".code").get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "a = 1\n\nb"


def test_the_page_works_on_a_phone(opened, scripted):
    _, server, _ = scripted(["\n| a | b |\n|---|---|\n| " + "x" * 300 + " | y |"])
    page = opened(server, viewport={"width": 360, "height": 640})
    assert not page.locator("#side").is_visible()
    say(page, "Hi")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Conversations").click()
    assert page.locator("#side").is_visible()
    page.click("#new")
    assert not page.locator("#side").is_visible()
    page.get_by_role("button", name="Conversations").click()
    page.mouse.click(330, 300)  # beside the list
    assert not page.locator("#side").is_visible()


def test_a_classifier_has_no_chat_box(opened, server_of, bundle_of):
    with server_of(bundle_of("sequence-classification")) as server:
        page = opened(server)
        page.get_by_role("button", name="Classify").wait_for()
        assert not page.locator("#system").is_visible()
        assert not page.locator("#side").is_visible()
        say(page, "some text")
        page.locator(".label").first.wait_for()
        assert "Nothing is said" not in page.locator("#talk").inner_text()
        shares = [float(text.split()[0]) for text in page.locator(".label span:last-child").all_inner_texts()]
        assert sum(shares) == pytest.approx(100, abs=0.2)
        assert shares == sorted(shares, reverse=True)


def test_each_of_several_calls_gets_its_own_result(opened, scripted, demo_bundle):
    scheduler, server, _ = scripted(
        ['get_time\n{"city": "Oslo"}\n', 'get_time\n{"city": "Rome"}'], ["\nNoon."]
    )
    page = opened(server)
    page.click("#more summary")
    page.fill("#tools", json.dumps(TOOLS))
    say(page, "What time is it?")
    answered(page)
    for city, result in (("Oslo", "12:00"), ("Rome", "12:01")):
        assert page.get_attribute("#say", "placeholder") == f'Result of get_time {{"city": "{city}"}}'
        assert len(scheduler.requests) == 1
        say(page, result)
    answered(page, 2)
    assert page.locator("details.result div").all_text_contents() == ["12:00", "12:01"]
    prompt = contents(scheduler, 1, demo_bundle)
    assert prompt.index("12:00") < prompt.index("12:01")
