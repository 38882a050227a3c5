"""A chat template is code from strangers: whatever it does costs one request a bounded time and memory."""

import resource
import time

import pytest

from glm4_runtime import chat_template
from glm4_runtime.chat_template import ChatTemplate
from glm4_runtime.errors import BundleError, OvertimeError, RequestError
from glm4_runtime.workers.pool import WorkerPool
from glm4_runtime.workers.worker import TaskLimits

HELLO = [{"role": "user", "content": "hello"}]
MIB = 2**20
TIME, MEMORY, OUTPUT, FAILS = "processor time", "of memory", "MiB of text", "fails on"

# Each loops, repeats, pads, joins, indents or nests by a number that it chooses. What Jinja folds to a constant is
# refused when the template is compiled, so that most of them take their number from the conversation.
MANY = "(messages | length * 10 ** 10)"
ATTACKS = {
    "loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "recursion": (
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
        TIME,
    ),
    "recursive loop": (
        "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
        FAILS,
    ),
    "lipsum": ("{% for i in range(9999) %}{% set x = lipsum(n=9999) %}{% endfor %}", TIME),
    "power": (f"{{% set n = {MANY} %}}{{{{ (n ** n) % 7 }}}}", TIME),
    "sort": ("{% for i in range(9999) %}{% set x = range(9999) | sort(reverse=true) %}{% endfor %}", TIME),
    "replace": ("{% set a = 'a' * 10 ** 6 %}{{ a.replace('a', a) }}", MEMORY),
    "times": (f"{{{{ 'a' * {MANY} }}}}", MEMORY),
    "times a list": (f"{{{{ [1] * {MANY} }}}}", MEMORY),
    "times a tuple": (f"{{{{ (1, 2) * {MANY} }}}}", MEMORY),
    "center": (f"{{{{ messages[0].content.center({MANY}) }}}}", MEMORY),
    "ljust": (f"{{{{ messages[0].content.ljust({MANY}) }}}}", MEMORY),
    "zfill": (f"{{{{ messages[0].content.zfill({MANY}) }}}}", MEMORY),
    "center filter": (f"{{{{ 'a' | center({MANY}) }}}}", MEMORY),
    "indent filter": (f"{{{{ 'a\\nb' | indent({MANY}) }}}}", MEMORY),
    "%": ("{{ '%10000000000d' % messages | length }}", MEMORY),
    "format filter": ("{{ '%*d' | format(messages | length * 10 ** 9, 1) }}", MEMORY),
    "str.format": ("{{ '{:10000000000}'.format(messages | length) }}", MEMORY),
    "join": ("{{ range(99999) | map('string') | join('a' * 10 ** 5) }}", MEMORY),
    "tojson": ("{{ [[messages]] | tojson(indent=10 ** 9) }}", MEMORY),
    "separators": ("{{ range(9999) | list | tojson(separators=('a' * 10 ** 5, ':')) }}", MEMORY),
    "doubling a list": (
        "{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = n.l + n.l %}{% endfor %}",
        MEMORY,
    ),
    "doubling a text": (
        "{% set n = namespace(t='a') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        MEMORY,
    ),
    "strftime": (f"{{{{ strftime_now('%Y' * {MANY}) }}}}", MEMORY),
    "batch": ("{{ [1] | batch(10 ** 9, 0) | list }}", MEMORY),
    "output": ("{% for i in range(20) %}{{ 'a' * 10 ** 6 }}{% endfor %}", OUTPUT),
}  # fmt: skip


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """The limits of time are shortened, so that these tests are quick."""
    pool = pool_with(0.3)
    monkeypatch.setattr(chat_template, "_WORKERS", pool)
    yield
    pool.close()


def pool_with(seconds):
    """``seconds``: of processor time."""
    limits = TaskLimits(seconds=seconds, deadline=120, memory=256 * MIB, answer=16 * MIB)
    return WorkerPool("glm4_runtime.workers.templates", limits)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_costly_template_is_refused(name, monkeypatch):
    source, said = ATTACKS[name]
    if said != TIME:  # on a slow machine, too, another limit is reached first
        monkeypatch.setattr(chat_template, "_WORKERS", pool_with(60))
    template = ChatTemplate(source)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(RequestError, match=said) as caught:
        template.render(HELLO)
    assert isinstance(caught.value, OvertimeError) == (said == TIME)
    assert len(str(caught.value)) < 500
    # this process does next to nothing meanwhile: what is asked takes minutes
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
    assert ChatTemplate("{{ messages[0].content }}").render(HELLO) == "hello"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ ('9' * 4000) | int ** 99999 }}", TIME),
        ("{{ (10 ** 5000) | string }}", "not valid"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "."),
        ("{% for i in [1] %}" * 300 + "{% endfor %}" * 300, "."),
        ("{# " + "a" * 2**20 + " #}", "characters"),
    ],
)
def test_a_template_that_costs_too_much_to_compile_is_no_template(source, said):
    with pytest.raises(BundleError, match=said) as caught:
        ChatTemplate(source)
    assert "chat template" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_a_template_changes_is_gone_with_the_next_conversation():
    """A worker serves one request after another, and several templates."""
    keeps = ChatTemplate("{% set x = messages[0].content %}{{ x }}{{ y }}")
    other = ChatTemplate("{{ x }}{{ messages[0].content }}")
    assert keeps.render(HELLO, y=1) == "hello1"
    assert keeps.render([{"role": "user", "content": "bye"}]) == "bye"
    assert other.render(HELLO) == "hello"


def test_halves_of_surrogate_pairs_pass_through():
    assert (
        ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": "\ud800"}]) == "\ud800"
    )


def test_what_is_no_json_is_refused():
    with pytest.raises(RequestError, match="plain JSON"):
        ChatTemplate("{{ x }}").render(HELLO, x={1})
