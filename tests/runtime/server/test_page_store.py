"""Conversations that the chat page keeps in the browser: bounded, shared by its open pages, and safe from what is stored."""

import json

import pytest
from chat_page import answer, answered, say, talk_twice

SOUND = {
    "id": "a1",
    "messages": [{"role": "user", "content": "kept"}, {"role": "assistant", "content": "yes"}],
}
SPOILT = {
    "no JSON": "{",
    "no list": '{"a": 1}',
    "a number": "7",
    "nothing": "null",
    "no conversations": json.dumps([{"messages": 3}, None, 7, "x", {"messages": []}, {}]),
    "no messages": json.dumps([{"messages": [None]}, {"messages": [{"role": "user"}]}]),
    "foreign roles": json.dumps([{"messages": [{"role": "constructor", "content": "x"}]}]),
    "parts": json.dumps([{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}]),
    "calls": json.dumps([{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}]}]),
    "a thought": json.dumps([{"messages": [{"role": "assistant", "content": "", "thought": {"a": 1}}]}]),
    "a title": json.dumps([SOUND | {"title": 7}]),
}
PAIR = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "x" * 100_000}]


def titles(page):
    return page.locator("#list .open").all_inner_texts()


def stored(page):
    return page.evaluate("JSON.parse(localStorage.getItem(STORE))")


def open_with(opened, server, store):
    page = opened(server)
    page.evaluate("text => localStorage.setItem(STORE, text)", store)
    page.reload()
    return page


def test_what_is_spoilt_in_the_store_is_left_out(opened, server):
    page = opened(server)
    for name, store in SPOILT.items():
        page.evaluate("text => localStorage.setItem(STORE, text)", store)
        page.reload()
        assert titles(page) == [], name
        assert page.evaluate("document.activeElement.id") == "say", (
            name
        )  # the last of what the page does at its start
    page.evaluate("text => localStorage.setItem(STORE, text)", json.dumps([{"messages": 3}, SOUND]))
    page.reload()
    assert titles(page) == ["kept"]
    assert answer(page) == "yes"


def test_a_spoilt_store_is_written_anew(opened, scripted):
    _, server, _ = scripted(["\nfine"])
    page = open_with(opened, server, "{")
    say(page, "Hi")
    answered(page)
    assert [one["messages"][1]["content"] for one in stored(page)] == ["fine"]


@pytest.mark.parametrize("what", ["full", "forbidden"])
def test_a_page_without_a_store_remembers_by_itself(opened, scripted, what):
    _, server, _ = scripted(["\none"], ["\ntwo"])
    page = opened(server)
    refuse = "() => { throw new Error('refused'); }"
    if what == "full":
        page.evaluate(f"() => {{ Storage.prototype.setItem = {refuse}; }}")
    else:
        page.evaluate(f"() => {{ Object.defineProperty(window, 'localStorage', {{get: {refuse}}}); }}")
    talk_twice(page)
    assert titles(page) == ["second talk", "first talk"]
    assert "keeps no conversations" in page.locator("#kept").inner_text()
    page.get_by_role("button", name="first talk", exact=True).click()
    assert answer(page) == "one"


def test_the_oldest_conversations_make_room(opened, scripted):
    _, server, _ = scripted(["\n" + "y" * 150_000])
    old = [
        {"id": f"c{i}", "title": f"old {i}", "messages": PAIR} for i in range(52)
    ]  # 5.2 of 5.24 million characters
    page = open_with(opened, server, json.dumps(old))
    page.click("#new")
    say(page, "Hi")
    answered(page)
    kept = [one.get("title") for one in stored(page)]
    assert kept == [None, *(f"old {i}" for i in range(len(kept) - 1))]
    assert 45 < len(kept) < 52
    assert len(titles(page)) == len(kept)


def test_a_hundred_conversations_are_kept(opened, scripted):
    _, server, _ = scripted(["\nfine"])
    old = [{"id": f"c{i}", "title": f"old {i}", "messages": PAIR[:1]} for i in range(100)]
    page = open_with(opened, server, json.dumps(old))
    page.click("#new")
    say(page, "Hi")
    answered(page)
    assert titles(page) == ["Hi", *(f"old {i}" for i in range(99))]


def test_conversations_have_names(opened, scripted):
    _, server, _ = scripted(["\none"])
    page = opened(server)
    say(page, "a question")
    answered(page)
    page.get_by_role("button", name="Rename “a question”").click()
    name = page.get_by_role("textbox", name="Name of the conversation")
    assert name.input_value() == "a question"
    page.keyboard.press("Escape")
    assert titles(page) == ["a question"]
    page.keyboard.press("Enter")  # the focus is on the button again
    name.fill("<b>Plans</b>")
    page.keyboard.press("Enter")
    assert titles(page) == ["<b>Plans</b>"]
    assert page.evaluate("document.activeElement.title") == "Rename"
    page.reload()
    assert titles(page) == ["<b>Plans</b>"]


def test_a_deleted_conversation_can_come_back(opened, scripted):
    _, server, _ = scripted(["\none"], ["\ntwo"])
    page = opened(server)
    talk_twice(page)
    page.get_by_role("button", name="Delete “second talk”").click()
    assert titles(page) == ["first talk"]
    assert page.locator(".turn").count() == 0
    assert page.evaluate("document.activeElement.id") == "undo"
    page.keyboard.press("Enter")
    assert titles(page) == ["second talk", "first talk"]
    assert answer(page) == "two"
    assert not page.locator("#undo").is_visible()
    assert len(stored(page)) == 2


def test_two_open_pages_keep_each_others_conversations(opened, scripted):
    _, server, _ = scripted(["\none"], ["\ntwo"], ["\nthree"])
    first = opened(server)
    second = first.context.new_page()
    second.goto(server.url)
    for page, text in ((first, "from the first"), (second, "from the second")):
        say(page, text)
        answered(page)
    first.get_by_role("button", name="from the second", exact=True).wait_for()
    say(first, "again")
    answered(first, 2)
    assert [one["messages"][0]["content"] for one in stored(first)] == ["from the first", "from the second"]
    second.get_by_role("button", name="from the first", exact=True).click()
    assert answer(second, 1) == "three"


def test_a_question_outlives_a_page_that_is_closed_before_its_answer(opened, scripted):
    _, server, _ = scripted(["\nHe", None, "never"])
    page = opened(server)
    say(page, "long question")
    page.locator(".assistant").get_by_text("He", exact=True).wait_for()
    page.reload()
    assert page.locator(".user > .text").all_inner_texts() == ["long question"]
