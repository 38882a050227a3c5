"""The page at /, in a real headless Chromium where there is one."""

import json
import re
import shutil
from importlib.resources import files

import httpx
import pytest

PAGE = files("glm4_runtime.server").joinpath("page.html").read_text("utf-8")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TOOLS = [{"type": "function", "function": {"name": "get_time"}}]
THOUGHT = ["\nLet", " me see.", "</think>", "\n\nIt is", " <b>noon</b>."]


def test_the_page_needs_nothing_from_elsewhere(server):
    response = httpx.get(server.url)
    assert response.text == PAGE
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?://|//[a-z]|@import|url\(", PAGE.replace('"//', ""))
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """A function that opens a server's page; complaints of the browser fail the test."""
    pages = []
    complaints = []

    def open_page(server):
        page = browser.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type == "error" else None
        )
        page.goto(server.url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def say(page, text):
    page.fill("#say", text)
    page.keyboard.press("Enter")


def test_an_answer_comes_with_its_speed(opened, server):
    page = opened(server)
    page.get_by_role("heading", name="glm4-tiny").wait_for()
    page.click("#more summary")
    page.fill("#temperature", "0")
    say(page, "Who are you?")
    page.locator(".figures").wait_for()
    assert page.locator(".user").inner_text() == "Who are you?"
    assert page.locator(".assistant > div").inner_text().startswith("I am glm4-tiny, a very small model")
    assert re.match(
        r"[\d.]+ tokens/s · 34 tokens · first after \d+ ms · prompt 9", page.locator(".figures").inner_text()
    )
    say(page, "Hello")
    page.locator(".figures").nth(1).wait_for()
    assert page.locator(".assistant").count() == 2
    page.click("#new")
    assert page.locator(".turn").count() == 0


def test_thoughts_are_folded_and_stay_out_of_the_next_request(opened, scripted, thinking_bundle):
    scheduler, server, _ = scripted(THOUGHT, ["\nx"], bundle=thinking_bundle)
    page = opened(server)
    say(page, "When?")
    page.locator(".figures").wait_for()
    assert page.locator(".assistant > div").inner_text() == "It is <b>noon</b>."
    thought = page.locator("details.thought")
    assert thought.get_attribute("open") is None
    assert not thought.locator("div").is_visible()
    thought.locator("summary").click()
    assert thought.inner_text() == "Thought\nLet me see."
    say(page, "Sure?")
    page.locator(".figures").nth(1).wait_for()
    from glm4_runtime.tokenizer import Tokenizer

    prompt = Tokenizer.from_folder(thinking_bundle).decode(
        scheduler.requests[1].prompt_ids, skip_special_tokens=False
    )
    assert "Let me see" not in prompt
    assert "It is <b>noon</b>." in prompt


def test_a_call_is_folded_and_asks_for_its_result(opened, scripted):
    scheduler, server, _ = scripted(["get_time\n", '{"city": ', '"Oslo"}'], ["\nNoon."])
    page = opened(server)
    page.click("#more summary")
    page.fill("#tools", json.dumps(TOOLS))
    say(page, "What time is it?")
    page.locator(".figures").wait_for()
    call = page.locator("details.call")
    assert not call.locator("div").is_visible()
    call.locator("summary").click()
    assert call.inner_text() == 'Calls get_time\n{"city": "Oslo"}'
    assert page.get_attribute("#say", "placeholder") == "Result of get_time"
    say(page, "12:00")
    page.locator(".figures").nth(1).wait_for()
    assert page.locator(".assistant > div").nth(1).inner_text() == "Noon."
    assert len(scheduler.requests[1].prompt_ids) > len(scheduler.requests[0].prompt_ids)


def test_an_answer_can_be_stopped(opened, scripted):
    scheduler, server, _ = scripted(["\nHe", "llo", None, "never"])
    page = opened(server)
    say(page, "Hi")
    page.get_by_text("Hello", exact=True).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert scheduler.tickets[0].cancelled.wait(5)
    assert page.get_by_role("button", name="Send").is_visible()


def test_a_key_is_asked_for(browser, scripted):
    _, server, _ = scripted(["\nyes"], api_keys=("secret",))
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_text("a valid API key is needed").wait_for()
    page.fill("#key", "secret")
    say(page, "Hi")
    page.get_by_text("yes", exact=True).wait_for()
    page.close()
