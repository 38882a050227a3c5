"""Markdown of the chat page, in a real Chromium."""

import pytest

MARKDOWN = {
    "# Title": "<h3>Title</h3>",
    "a *b* **c** ***d*** ~~e~~ `f*g*`": "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <s>e</s> <code>f*g*</code></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "1. a\n\n   more\n2. b": '<ol start="1"><li>a<p>more</p></li><li>b</li></ol>',
    "1. a\n   - x\n   - y\n2. b": '<ol start="1"><li>a<ul><li>x</li><li>y</li></ul></li><li>b</li></ol>',
    "Steps:\n- a\n- b\nafter": "<p>Steps:</p><ul><li>a</li><li>b<br>after</li></ul>",
    "- [ ] open\n- [x] done": "<ul><li>☐ open</li><li>☑ done</li></ul>",
    "> a\n> b\n\nc": "<blockquote><p>a<br>b</p></blockquote><p>c</p>",
    "---": "<hr>",
    "| a | b |\n|---|--:|\n| 1 | 2 |\n| `x\\|y` |": '<div class="wide"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
    '<tbody><tr><td>1</td><td class="right">2</td></tr><tr><td><code>x|y</code></td><td class="right"></td></tr></tbody></table></div>',
    "a | b, no table": "<p>a | b, no table</p>",
    "[x](https://e.org/a_(b))": '<p><a href="https://e.org/a_(b)" target="_blank" rel="noopener noreferrer">x</a></p>',
    "[x](javascript:alert(1))": "<p><span>x</span></p>",
    "see https://e.org/a_b_c.": '<p>see <a href="https://e.org/a_b_c" target="_blank" rel="noopener noreferrer">https://e.org/a_b_c</a>.</p>',
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    "\\*plain\\*": "<p>*plain*</p>",
    "$a_1 * b_1$ costs $5 or $6": '<p><span class="formula">$a_1 * b_1$</span> costs $5 or $6</p>',
    "\\(x_1 * y_1\\)": '<p><span class="formula">\\(x_1 * y_1\\)</span></p>',
    "$$\na_1 *\n\nb_1*\n$$\nc": '<div class="formula">$$\na_1 *\n\nb_1*\n$$</div><p>c</p>',
    "\\[ x^2 \\]": '<div class="formula">\\[ x^2 \\]</div>',
    "**unclosed and `open": "<p>**unclosed and `open</p>",
    "你好，**世界**。": "<p>你好，<strong>世界</strong>。</p>",
}


def markdown(page, source):
    return page.evaluate(
        "source => { const box = make('div'); new Markdown(box).show(source); return box.innerHTML; }", source
    )


def test_markdown(opened, server):
    page = opened(server)
    assert {source: markdown(page, source) for source in MARKDOWN} == MARKDOWN
    code = markdown(page, "```py\nif x < 1:\n\n    *y*\n```\nafter")
    assert "<code>if x &lt; 1:\n\n    *y*</code></pre></div><p>after</p>" in code
    assert "<span>py</span>" in code
    # a block that is still being written
    assert "<code>a\nb</code></pre>" in markdown(page, "```\na\nb")


def test_a_growing_text_ends_as_the_whole_text(opened, server):
    page = opened(server)
    source = "\n\n".join([*MARKDOWN, "```py\nx\n```"])
    grown, kept = page.evaluate(
        """source => {
          const box = make('div'), grown = new Markdown(box);
          grown.show(source.slice(0, 40));
          const first = box.firstChild;
          for (let length = 41; length <= source.length; length += 3) grown.show(source.slice(0, length));
          grown.show(source);
          return [box.innerHTML, box.firstChild === first];
        }""",
        source,
    )
    assert grown == markdown(page, source)
    assert kept  # what has not changed is not drawn again


@pytest.mark.parametrize(
    "piece",
    [
        "*",
        "`",
        "[",
        "$",
        "> ",
        "- ",
        "**a ",
        "`a",
        "\\(",
        "\\[\n",
        "$$\n",
        "| ",
        "|-|\n",
        "_a ",
        "~~a",
        "[](",
        "1. ",
        "  - a\n",
    ],
)
def test_no_text_stops_the_page(opened, server, piece):
    page = opened(server)
    page.set_default_timeout(20_000)
    page.evaluate("source => { new Markdown(make('div')).show(source); }", piece * (40_000 // len(piece)))
