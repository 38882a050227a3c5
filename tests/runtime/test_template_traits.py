"""What becomes of a conversation in each kind of template: system messages, tools, calls, results, ends of turns."""

import pytest

from glm4_runtime import chat_template
from glm4_runtime.chat_template import ChatTemplate
from glm4_runtime.errors import BundleError
from glm4_runtime.template_traits import as_content, as_metadata, as_objects, as_text, traits_of
from glm4_runtime.workers.pool import WorkerPool
from glm4_runtime.workers.worker import TaskLimits

CONTROL = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|end|>")

# In words of our own, the structure of the family's templates.
GLM4 = """\
[gMASK]<sop>
{%- if tools %}<|system|>
{% for t in tools %}{{ t.function.name }}: {{ t.function | tojson }}
{% endfor %}{%- endif %}
{%- for m in messages %}
{%- if m.role == "assistant" and m.metadata %}<|assistant|>{{ m.metadata }}
{{ m.content }}
{%- else %}<|{{ m.role }}|>
{{ m.content }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
RUMINATION = """\
[gMASK]<sop><|system|>
You study. Your functions: [{"name": "search", "parameters": {}}, {"name": "finish", "parameters": {}}]
{%- for m in messages if m.role != "system" %}
{%- if m.role == "user" %}<|user|>
{{ m.content }}
{%- elif m.role == "assistant" and m.metadata %}<|assistant|>{{ m.metadata }} {{ "\\n" }}
{{- m.content }}
{%- elif m.role == "assistant" %}<|assistant|>
{{ m.content.split("</think>")[-1].strip() }}
{%- elif m.role == "observation" %}<|observation|>
{{ m.content }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
<think>{% endif %}"""
PLAIN = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
OBJECTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
)
TEXT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}\n"
    "{{ c.function.arguments + '' }}{% endfor %}{% endfor %}"
)


def traits(source):
    return traits_of(ChatTemplate(source), CONTROL)


@pytest.mark.parametrize(
    ("source", "system", "tools", "shape", "enveloped", "results", "ends"),
    [
        (GLM4, True, True, as_metadata, False, "observation", ("<|user|>", "<|observation|>")),
        (RUMINATION, False, False, as_content, True, "observation", ("<|user|>", "<|observation|>")),
        (RUMINATION.replace('"name"', "name"), False, False, as_content, True, "observation", ("<|user|>", "<|observation|>")),
        (PLAIN, True, False, None, False, "observation", ("<|user|>",)),
        (OBJECTS, True, False, as_objects, False, "observation", ("<|user|>", "<|observation|>")),
        (TEXT, True, False, as_text, False, "observation", ("<|user|>", "<|observation|>")),
        (GLM4.replace('<|{{ m.role }}|>', '<|{{ "x" if m.role == "observation" else m.role }}|>'),
         True, True, as_metadata, False, "observation", ("<|user|>",)),
        ("{% for m in messages if m.role in ('user', 'assistant', 'tool') %}<|user|>{{ m.content }}<|end|>{% endfor %}",
         False, False, None, False, "tool", ("<|end|>",)),
        ("{{ messages[0].content }}", True, False, None, False, None, ()),
        ("{{ raise_exception('no') }}", False, False, None, False, None, ()),
    ],
)  # fmt: skip
def test_what_reaches_the_prompt(source, system, tools, shape, enveloped, results, ends):
    found = traits(source)
    assert (found.system, found.tools, found.shape, found.enveloped) == (system, tools, shape, enveloped)
    assert (found.results, found.ends) == (results, ends)


def test_functions_of_the_templates_own_text_are_known():
    assert traits(RUMINATION).functions == {"search", "finish"}
    assert traits(GLM4).functions == frozenset()
    assert traits(RUMINATION).dropped == ["system messages", "tools"]
    assert traits(GLM4).dropped == []


def test_the_demos_template_takes_everything():
    from pathlib import Path

    found = traits_of(ChatTemplate.from_folder(Path(__file__).parents[2] / "demo" / "glm4-tiny"), CONTROL)
    assert found.dropped == []
    assert found.ends == ("<|user|>", "<|observation|>")


def test_a_template_that_never_ends_is_refused_before_anything_is_served(monkeypatch):
    limits = TaskLimits(seconds=0.2, deadline=10, memory=2**28, answer=2**20)
    monkeypatch.setattr(chat_template, "_WORKERS", WorkerPool("glm4_runtime.workers.templates", limits))
    with pytest.raises(BundleError, match=r"cannot be used.*0\.2 s of processor time"):
        traits("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
