"""The levels of tests: every test is in one of them, and the list of slow ones names tests that exist."""

import ast
import re
from pathlib import Path

from slow_tests import LIST, listed

ROOT = Path(__file__).parents[2]
MARKS = ("slow", "alone", "more")


def runs(target):
    """What each line of a target of the Makefile selects, as a function of a test's marks."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[
        1
    ]
    found = re.findall(r'-m "?(not [a-z ]+|[a-z ]+)"?$', recipe, re.MULTILINE)
    assert len(found) == recipe.count("\n")
    return [
        lambda marks, words=words: eval(words, {mark: mark in marks for mark in MARKS}) for words in found
    ]


def test_every_test_runs_once_in_one_level():
    for bits in range(2 ** len(MARKS)):
        marks = {mark for i, mark in enumerate(MARKS) if bits >> i & 1}
        fast, suite, more = (
            sum(run(marks) for run in runs(name)) for name in ("test-fast", "test", "test-more")
        )
        assert suite + more == 1, marks
        assert fast == (not marks)


def test_the_list_names_tests_that_exist():
    names = listed()
    assert len(names) > 20
    for name in names:
        file, function = name.split("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name
    assert sorted(names) == LIST.read_text("utf-8").split()
