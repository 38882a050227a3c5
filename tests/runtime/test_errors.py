"""A message quotes what strangers wrote, and stays one line of at most 500 characters."""

import time

import pytest

from glm4_runtime.errors import (
    BundleError,
    CheckpointError,
    Glm4Error,
    QueueFullError,
    RequestError,
    one_line,
    shown,
    some,
)

DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.parametrize("kind", [Glm4Error, BundleError, CheckpointError, RequestError])
@pytest.mark.parametrize(
    "name", ["x" * 1_000_000, "a\nb\r\n\tc", "\x1b[31mred\x00", "\ud800", "\u2028", "好" * 4_000, "\u202e"]
)
def test_every_refusal_is_one_printable_line(kind, name):
    message = str(kind(f"the tensor {name} is damaged; download it again"))
    assert len(message) <= 500
    assert message.isprintable()
    message.encode()
    assert message.startswith("the tensor ")
    assert message.endswith(" is damaged; download it again")


def test_a_short_message_is_left_as_it_is():
    assert (
        str(BundleError("model.onnx fehlt, 好; export it again")) == "model.onnx fehlt, 好; export it again"
    )
    assert str(QueueFullError("full", 1.0)) == "full"


def test_a_long_message_keeps_its_beginning_and_its_advice():
    line = one_line("begin " + "x" * 2000 + " end", 100)
    assert len(line) == 100
    assert line.startswith("begin xxx")
    assert line.endswith("xxx end")
    assert " ... " in line
    assert one_line("y" * 500) == "y" * 500


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("好", '"好"'),
        (None, "null"),
        ([1, 2.5, True], "[1, 2.5, true]"),
        ({"a": 1}, '{"a": 1}'),
        ("x" * 10**6, '"' + "x" * 76 + "..."),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21..."),
        (10**5000, "..."),
        ([1, 10**5000], "[1..."),
        (DEEP, "[" * 77 + "..."),
        ({(1, 2): 3}, "{..."),
    ],
    ids=["text", "null", "list", "object", "long text", "long list", "digits", "digits later", "deep", "bad key"],
)  # fmt: skip
def test_a_value_is_shown_in_eighty_characters_whatever_it_is(value, text):
    began = time.process_time()
    assert shown(value) == text
    assert time.process_time() - began < 1


def test_a_list_of_names_is_cut():
    assert some(["a", "b"]) == "a, b"
    assert some(str(i) for i in range(9)) == "0, 1, 2, 3, and 5 more"
    assert len(some(["x" * 10**6] * 9)) < 400
