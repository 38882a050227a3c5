"""The chat page by keyboard, by a screen reader, in dark, on a phone, and with an answer that means harm."""

import json
from functools import partial
from pathlib import Path

import pytest
from chat_page import CHROMIUM, answered, say

if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)

TOOLS = [{"type": "function", "function": {"name": "get_time"}}]
THOUGHT = ["\nThe user asks for", " the time in Oslo.", "</think>", 'get_time\n{"city": "Oslo"}']
ANSWER = """
It is **12:00** in Oslo.

## How to ask by code

```python
print(get_time(city="Oslo"))
```

| city | time |
|---|--:|
| Oslo | 12:00 |

> A quote with a [link](https://example.org) and `code`.
"""
LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
    "phone-dark": {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}},
}
HARM = "<img src=x onerror=harm()><script>harm()</script><iframe src='javascript:harm()'></iframe>"
HARMFUL_LINKS = (
    "[a](javascript:harm()) [b](data:text/html,<script>harm()</script>) ![c](http://127.0.0.1:9/x.png)"
)


def conversation(opened, scripted, bundle, **look):
    """A conversation with a thought, a call of a tool, its result, and Markdown."""
    _, server, _ = scripted(THOUGHT, ["\n</think>", ANSWER], bundle=bundle)
    page = opened(server, **look)
    page.click("#more summary")
    page.fill("#tools", json.dumps(TOOLS))
    page.click("#more summary")
    say(page, "What time is it in Oslo?")
    answered(page)
    say(page, '{"time": "12:00"}')
    answered(page, 2)
    return page


def faults(page):
    """What axe-core finds: rule, help, and the first element."""
    # the order of an answer's headings is the model's
    options = {"resultTypes": ["violations"], "rules": {"heading-order": {"enabled": False}}}
    found = axe.Axe().run(page, options=options).response["violations"]
    return [(one["id"], one["help"], one["nodes"][0]["html"]) for one in found]


@pytest.mark.parametrize(
    "look", [pytest.param(look, marks=pytest.mark.more if look == "phone-dark" else ()) for look in LOOKS]
)
def test_axe_finds_no_fault(opened, scripted, thinking_bundle, look):
    """Pictures for people are in out/page."""
    page = conversation(opened, scripted, thinking_bundle, **LOOKS[look])
    pictures = Path(__file__).parents[3] / "out" / "page"
    page.screenshot(path=pictures / f"{look}.png")
    assert faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    for summary in page.locator("summary").all():
        summary.click()
    if "phone" in look:
        page.get_by_role("button", name="Conversations").click()
    page.screenshot(path=pictures / f"{look}-open.png")
    assert faults(page) == []
    page.get_by_role("button", name="Keys").click() if "phone" not in look else page.keyboard.press(
        "Control+/"
    )
    page.screenshot(path=pictures / f"{look}-keys.png")
    assert faults(page) == []


def test_every_part_has_a_role_and_a_name(opened, scripted, thinking_bundle):
    page = conversation(opened, scripted, thinking_bundle)
    tree = page.locator("body").aria_snapshot()
    for line in (
        '- navigation "Conversations":',
        '- button "New chat"',
        '- button "Rename “What time is it in Oslo?”"',
        '- button "Delete “What time is it in Oslo?”"',
        "- banner:",
        '- main "Conversation":',
        '- article "You":',
        '- article "Answer":',
        r"""- 'article "Result of get_time {\"city\": \"Oslo\"}"':""",
        '- textbox "Message"',
        '- button "Send"',
    ):
        assert line in tree, line


def test_a_screen_reader_gets_each_paragraph_once(opened, scripted):
    scheduler, server, _ = scripted(["\nFirst", " part.\n\n", "Second", None, " part."])
    page = opened(server)
    spoken = page.locator("#spoken[aria-live=polite] p")
    say(page, "Hi")
    spoken.nth(0).wait_for(state="attached")
    assert spoken.all_text_contents() == ["First part."]
    scheduler.go.set()
    answered(page)
    assert spoken.all_text_contents() == ["First part.", "Second part."]
    assert page.locator("#state[role=status]").inner_text() == ""


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.textContent")


def test_the_keyboard_is_enough(opened, scripted):
    scheduler, server, _ = scripted(["\none"], ["\ntwo"], ["\nHe", "llo", None, "never"])
    page = opened(server)
    assert focused(page) == "say"
    page.keyboard.type("alpha")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("beta")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".user > .text").inner_text() == "alpha\nbeta"
    page.keyboard.press("Tab")
    assert focused(page) == "send"
    page.keyboard.press("Tab")
    assert focused(page) == "Settings"
    page.keyboard.press("Shift+Escape")
    assert focused(page) == "say"
    page.keyboard.press("ArrowUp")
    edited = page.get_by_role("textbox", name="Edit the message")
    assert edited.input_value() == "alpha\nbeta"
    page.keyboard.press("Escape")
    assert focused(page) == "Edit"
    page.keyboard.press("Control+/")
    keys = page.get_by_role("dialog", name="Keys")
    assert "New chat" in keys.inner_text()
    page.keyboard.press("Escape")
    assert not keys.is_visible()
    page.keyboard.press("Control+Shift+S")
    assert not page.locator("#side").is_visible()
    page.keyboard.press("Control+Shift+S")
    assert focused(page) == "new"
    page.keyboard.press("Control+Shift+O")
    assert focused(page) == "say"
    assert page.locator(".turn").count() == 0
    page.keyboard.type("gamma")
    page.keyboard.press("Enter")
    answered(page)
    page.get_by_role("button", name="Regenerate").focus()
    page.keyboard.press("Enter")
    page.locator(".assistant").get_by_text("Hello", exact=True).wait_for()
    page.keyboard.press("Escape")
    page.locator(".assistant").get_by_text("Stopped.").wait_for()
    assert scheduler.tickets[2].cancelled.wait(5)
    assert focused(page) == "say"


def test_harmful_answers_are_only_text(opened, scripted, thinking_bundle):
    thought = [f"\n{HARM}", "</think>", "get_time\n", json.dumps({"x": HARM})]
    _, server, _ = scripted(
        thought,
        ["\n</think>", f"\n{HARM}\n\n{HARMFUL_LINKS}\n\n```{HARM}\n{HARM}\n```"],
        bundle=thinking_bundle,
    )
    page = opened(server)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate("() => { window.harm = () => { window.harmed = true; }; }")
    page.click("#more summary")
    page.fill("#tools", json.dumps(TOOLS))
    say(page, HARM)
    answered(page)
    say(page, HARM)
    answered(page, 2)
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="Name of the conversation").fill(HARM)
    page.keyboard.press("Enter")
    assert page.locator("#talk").get_by_text("<script>harm()</script>").count() >= 5
    assert page.locator("#talk :is(img, script, iframe, svg, object, style), #list img").count() == 0
    assert page.locator("#talk a").evaluate_all("links => links.map(link => link.protocol)") == ["http:"]
    assert page.evaluate("window.harmed") is None
    assert all(url.startswith(f"{server.url}/v1/") for url in asked)


def fulfill(route, status, body):
    route.fulfill(status=status, body=body)


def test_failures_are_said_in_plain_words(opened, scripted, complaints):
    _, server, _ = scripted()
    page = opened(server)
    page.get_by_role("heading", name="glm4-tiny").wait_for()
    for status, body, words in (
        (502, "<html>Bad Gateway</html>", "The proxy does not reach the server."),
        (413, "", "The conversation is too long for the server."),
        (429, "{}", "The server has too much to do. Try again in a moment."),
        (418, "", "The server answered with status 418."),
        (400, json.dumps({"error": {"message": HARM}}), HARM),
        (200, "data: {half", "The connection to the server broke before the answer ended."),
        (200, "data: {half\n\n", "The connection to the server broke before the answer ended."),
        (200, 'data: {"error": {"message": "the model stopped"}}\n\n', "the model stopped"),
    ):
        page.route("**/v1/chat/**", partial(fulfill, status=status, body=body))
        say(page, "Hi")
        page.locator("#problem").get_by_text(words).wait_for()
        assert page.input_value("#say") == "Hi"
        assert page.locator(".turn").count() == 0
        page.unroute("**/v1/chat/**")
    page.route("**/v1/models", lambda route: route.fulfill(body="<html>A login</html>"))
    page.reload()
    page.locator("#problem").get_by_text("is no server of glm4-deploy").wait_for()
    complaints.clear()  # of the statuses


def test_the_page_works_under_a_path_prefix(opened, scripted):
    _, server, _ = scripted(["\nfine"], path_prefix="/models/glm")
    page = opened(server)
    page.goto(f"{server.url}/models/glm/")
    say(page, "Hi")
    answered(page)
    assert page.evaluate("STORE") == "glm4-deploy /models/glm/"


def test_a_name_of_the_model_can_be_chosen(opened, scripted):
    _, server, _ = scripted(["\nfine"], aliases=("other=glm4-tiny",))
    page = opened(server)
    page.get_by_role("heading", name="glm4-tiny").wait_for()
    page.click("#more summary")
    page.get_by_label("Model").select_option("other")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hi")
    assert asked.value.post_data_json["model"] == "other"
    answered(page)
