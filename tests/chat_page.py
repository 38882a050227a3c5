"""Drives the chat page in a headless Chromium, where there is one."""

import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def say(page, text):
    page.fill("#say", text)
    page.keyboard.press("Enter")


def answered(page, count=1):
    """Wait until so many answers have ended."""
    page.locator(".assistant:not([aria-busy]) .figures").nth(count - 1).wait_for()


def answer(page, index=0):
    return page.locator(".assistant > .text").nth(index).inner_text()


def talk_twice(page):
    """Two conversations, "first talk" and "second talk", with an answer each."""
    say(page, "first talk")
    answered(page)
    page.click("#new")
    say(page, "second talk")
    answered(page)
