"""Chat templates: GLM-4's shape of prompt, where templates come from, and what they may not do."""

import json
import re

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from glm4_runtime.chat_template import ChatTemplate
from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.tokenizer import Tokenizer

# The structure of GLM-4's templates, in words of our own.
GLM_LIKE = """\
[gMASK]<sop>
{%- if tools %}
<|system|>
Functions:
{% for tool in tools %}
    {%- set function = tool.function if tool.get("function") else tool %}
## {{ function.name }}
{{ function | tojson(indent=2, ensure_ascii=False) }}
{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- set said = message.content.split("</think>")[-1].strip() %}
    {%- if message.role == "tool" or message.role == "observation" %}
<|observation|>
{{ said }}
    {%- elif message.role == "assistant" and message.metadata %}
<|assistant|>{{ message.metadata }}
{{ said }}
    {%- else %}
<|{{ message.role }}|>
{{ said }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|assistant|>
{%- endif %}
"""
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"name": "weather", "description": "今日 <b>天气</b> & 'more'", "parameters": {"type": "object"}}


def render(source, messages=HELLO, special_tokens=None, **options):
    return ChatTemplate(source, special_tokens).render(messages, **options)


def test_a_conversation_becomes_a_prompt():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "cold?"}]},
        {"role": "assistant", "content": "<think>look it up</think>\n", "metadata": "weather"},
        {"role": "observation", "content": "-3"},
        {"role": "assistant", "content": None},
    ]
    expected = (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nIs it cold?<|assistant|>weather\n"
        "<|observation|>\n-3<|assistant|>\n"
    )
    assert render(GLM_LIKE, messages, add_generation_prompt=False) == expected
    assert render(GLM_LIKE, messages) == expected + "<|assistant|>"
    assert messages[4]["content"] is None


def test_tools_are_listed_as_plain_json_in_the_order_given():
    prompt = render(GLM_LIKE, tools=[{"type": "function", "function": WEATHER}])
    listed = json.dumps(WEATHER, ensure_ascii=False, indent=2)
    assert prompt == f"[gMASK]<sop><|system|>\nFunctions:\n## weather\n{listed}\n<|user|>\nhello<|assistant|>"
    assert render("{{ tools is none }}", tools=[]) == "True"
    assert (
        render(GLM_LIKE, tools=[])
        == render(GLM_LIKE, tools=None)
        == "[gMASK]<sop><|user|>\nhello<|assistant|>"
    )


def test_the_prefix_is_encoded_once():
    made = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"])
    made.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 256), ("<sop>", 257)]
    )
    tokenizer = Tokenizer(made)
    ids = tokenizer.encode(render(GLM_LIKE), add_special_tokens=False)
    assert ids[:3] == [256, 257, 258]
    assert ids[-1] == 259
    assert ids.count(256) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
            "hello",
        ),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ ['é'] | tojson(ensure_ascii=True, separators=(',', ':')) }}", '["\\u00e9"]'),
        ("{{ bos_token }}{{ eos_token }}", "[gMASK]<|endoftext|>"),
        ("{{ enable_thinking }}{{ nothing_of_the_kind }}", "False"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc"),
        ("{% generation %}said{% endgeneration %}.", "said."),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        ),
        ("{{ '<b>' }}{{ tools is none }}{{ add_generation_prompt }}", "<b>TrueTrue"),
    ],
)
def test_templates_find_what_they_are_written_for(source, expected):
    roles = {"bos_token": "[gMASK]", "eos_token": "<|endoftext|>"}
    assert render(source, special_tokens=roles, enable_thinking=False) == expected


def test_templates_know_the_day():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ missing() }}",
        "{{ missing | tojson }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        # ways out of the sandbox
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.datetime }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{% set x = self.__init__.__globals__ %}{{ x.__builtins__ }}",
        # changing the caller's data
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_what_a_template_may_not_do_fails_the_request_in_one_line(source):
    messages = [dict(HELLO[0])]
    template = ChatTemplate(source)
    with pytest.raises(RequestError, match="chat template") as caught:
        template.render(messages)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert messages == HELLO


def test_what_the_template_says_against_a_conversation_reaches_the_user():
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must\n alternate') }}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        (None, "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\]"),
        ([HELLO[0], {"content": "x"}], r"messages\[1\]"),
        ([{"role": 5, "content": "x"}], "role"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": {"text": "x"}}], "content"),
        ([{"role": "user", "content": ["x"]}], "text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "text parts"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "text parts"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message):
    with pytest.raises(RequestError, match=message):
        render(GLM_LIKE, messages)


@pytest.mark.parametrize("tools", [{"name": "x"}, ["x"], "x", [5]])
def test_what_are_no_tools_is_refused(tools):
    with pytest.raises(RequestError, match="tools"):
        render(GLM_LIKE, tools=tools)


def write(folder, config=None, template=None):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ChatTemplate.from_folder(folder)


def test_the_file_goes_before_the_config(tmp_path):
    in_config = {"chat_template": "config {{ eos_token }}", "eos_token": {"content": "<|endoftext|>"}}
    assert write(tmp_path, in_config).render(HELLO) == "config <|endoftext|>"
    assert write(tmp_path, template="file 文 {{ eos_token }}").render(HELLO) == "file 文 <|endoftext|>"


def test_a_list_of_templates_has_one_for_tools(tmp_path):
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    template = write(tmp_path, {"chat_template": listed})
    assert template.render(HELLO) == template.render(HELLO, tools=[]) == "plain"
    assert template.render(HELLO, tools=[WEATHER]) == "with tools"
    assert write(tmp_path, {"chat_template": listed[:1]}).render(HELLO, tools=[WEATHER]) == "plain"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no chat template"),
        ({}, "no chat template"),
        ({"chat_template": 5}, "must be a text"),
        ({"chat_template": [{"name": "default"}]}, "must be a text"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, "only: rag"),
        ({"chat_template": "fine\n{% if %}"}, "at line 2"),
        ({"chat_template": "{% for %}"}, "not valid"),
        ({"chat_template": "{{ messages | no_such_filter }}"}, "no_such_filter"),
    ],
)
def test_a_folder_without_a_usable_template_is_refused(tmp_path, config, message):
    with pytest.raises(BundleError, match=message):
        write(tmp_path, config)


def test_a_template_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"chat_template\.jinja"):
        ChatTemplate.from_folder(tmp_path)
