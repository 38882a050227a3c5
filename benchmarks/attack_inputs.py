"""Generated input for attacks: JSON schemas, Lark grammars, regular expressions and chat templates.

Each generator leans towards what is large, deep or recursive, and stays mostly valid: what is not is refused at once.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 3, 7, 100, 999_983, 2**31, -(2**31), 2**53, 2**63 - 1, 1024 - 2**63, 2**64, 10**19,
    0.1, -0.5, 1e-9, 1e300, 5e-324, -9.223372036854774e18,
)  # fmt: skip
COUNTS = (0, 1, 2, 5, 20, 100, 1000, 10_000, 100_000)
# Refused at once for the most part: one value in RARELY.
EDGES = (2**63, -(2**63), 1 - 2**63, -(10**40), -1e308, 1.7976931348623157e308, -9.223372036854775e18, 2**128)
RARELY = 40
FORMATS = (
    "date",
    "date-time",
    "time",
    "email",
    "uuid",
    "ipv4",
    "ipv6",
    "hostname",
    "uri",
    "duration",
    "nothing",
)
TEXTS = ("", "a", "é", "\0", "🚀", "a" * 5000, '"', "\\", "</think>", "<|user|>", "\n", "{", "x-guidance")
ATOMS = (
    "a", "b", ".", r"\d", r"\w", r"\s", r"\S", "[a-z]", "[^a]", r"\p{L}", r"[\u4e00-\u9fff]", r"\n", "é", "🚀", "(?s:.)", "(?i:ab)",
    "[a-c&&b-d]", r"\b", "^", "$", r"\x41", "(?:)", "[\\s\\S]",
)  # fmt: skip


def regex(rng: random.Random, depth: int = 0) -> str:
    """A regular expression: repetitions of repetitions, alternatives, unions of dots."""
    roll = rng.random()
    if depth > rng.choice((2, 3, 5, 8)) or roll < 0.2:
        return rng.choice(ATOMS)
    if roll < 0.5:
        return f"({regex(rng, depth + 1)}){_repetition(rng)}"
    if roll < 0.7:
        return "|".join(f"({regex(rng, depth + 1)})" for _ in range(rng.choice((2, 3, 10))))
    if roll < 0.72:
        return "|".join(f"w{rng.randrange(10**6)}" for _ in range(rng.choice((100, 3000))))
    if roll < 0.74:
        return "(" * (nested := rng.choice((10, 100, 250, 2000))) + "a" + f"){_repetition(rng)}" * nested
    return "".join(regex(rng, depth + 1) for _ in range(rng.choice((2, 3, 6))))


def _number(rng: random.Random, usual: Sequence[float]) -> float:
    return rng.choice(EDGES if rng.randrange(RARELY) == 0 else usual)


def _repetition(rng: random.Random) -> str:
    low, high = sorted(rng.choice((0, 1, 3, 30, 300, 3000)) for _ in range(2))
    return rng.choice(("*", "+", "?", f"{{{low}}}", f"{{{low},}}", f"{{{low},{high}}}", "*?", ""))


def schema(rng: random.Random) -> dict[str, Any]:
    """A JSON schema with definitions that refer to each other."""
    names = [f"d{number}" for number in range(rng.choice((0, 1, 3, 10, 300)))]
    made = _schema(rng, names, 0)
    found: dict[str, Any] = made if isinstance(made, dict) else {}
    if names:
        chain = rng.random() < 0.3
        found["$defs"] = {
            name: _link(rng, names, number) if chain else _schema(rng, names, 2)
            for number, name in enumerate(names)
        }
    return found


def _link(rng: random.Random, names: list[str], number: int) -> dict[str, Any]:
    """A definition that leads to the next one."""
    below = {"$ref": f"#/$defs/{names[(number + 1) % len(names)]}"}
    kind = rng.choice(("items", "properties", "anyOf", "allOf", "plain"))
    if kind == "items":
        return {"type": "array", "items": below}
    if kind == "properties":
        return {"type": "object", "properties": {"a": below, "b": below}, "required": ["a"]}
    return below if kind == "plain" else {kind: [below, {"type": "null"}] if kind == "anyOf" else [below]}


def _schema(rng: random.Random, names: list[str], depth: int) -> Any:
    if depth > rng.choice((2, 3, 4)):
        return rng.choice(({}, True, False, {"type": "string"}, {"type": "null"}))
    makers = (_text_schema, _number_schema, _array_schema, _object_schema, _choice_schema, _value_schema)
    made = rng.choice(makers)(rng, names, depth)
    if names and rng.random() < 0.3:
        made["$ref"] = f"#/$defs/{rng.choice(names)}"
    if rng.random() < 0.2:
        made |= rng.choice(makers)(rng, names, depth)
    if rng.random() < 0.005:
        for _ in range(rng.choice((50, 100, 130, 2000))):
            made = {rng.choice(("items", "additionalProperties")): made}
    return made


def _text_schema(rng: random.Random, _names: list[str], _depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for key in rng.sample(("minLength", "maxLength", "pattern", "format"), rng.randrange(4)):
        made[key] = {"pattern": lambda: regex(rng), "format": lambda: rng.choice(FORMATS)}.get(
            key, lambda: _number(rng, COUNTS)
        )()
    return made


def _number_schema(rng: random.Random, _names: list[str], _depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": rng.choice(("integer", "number"))}
    keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
    for key in rng.sample(keys, rng.randrange(4)):
        made[key] = _number(rng, NUMBERS) + rng.choice((0, 0, 1))
    return made


def _array_schema(rng: random.Random, names: list[str], depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "array", "items": _schema(rng, names, depth + 1)}
    for key in rng.sample(("minItems", "maxItems", "prefixItems", "uniqueItems"), rng.randrange(3)):
        made[key] = _number(rng, COUNTS)
        if key == "prefixItems":
            made[key] = [_schema(rng, names, depth + 1) for _ in range(rng.choice((1, 5)))]
    return made


def _object_schema(rng: random.Random, names: list[str], depth: int) -> dict[str, Any]:
    count = rng.choice((0, 1, 3, 8, 8, 300)) if depth else rng.choice((1, 4, 2000))
    keys = [f"k{number}" if rng.random() < 0.9 else rng.choice(TEXTS) for number in range(count)]
    made: dict[str, Any] = {
        "type": "object",
        "properties": {
            key: {"type": "integer"} if count > 8 else _schema(rng, names, depth + 1) for key in keys
        },
        "additionalProperties": rng.choice((True, False, {"type": "string"})),
    }
    made["required"] = [key for key in keys if rng.random() < 0.5]
    if rng.random() < 0.2:
        made["patternProperties"] = {regex(rng): {} for _ in range(rng.choice((1, 3, 40)))}
    return made


def _choice_schema(rng: random.Random, names: list[str], depth: int) -> dict[str, Any]:
    key = rng.choice(("anyOf", "allOf", "oneOf"))
    count = rng.choice((1, 2, 3, 9))
    if rng.random() < 0.2:
        return {
            "type": "string",
            key: [{"pattern": regex(rng)} for _ in range(rng.choice((2, 3, 5, 8, 12, 13)))],
        }
    return {key: [_schema(rng, names, depth + 1) for _ in range(count)]}


def _value_schema(rng: random.Random, _names: list[str], _depth: int) -> dict[str, Any]:
    values = [
        rng.choice((*NUMBERS, *TEXTS, None, True, [], {}, [1, {"a": [2]}])) for _ in range(rng.choice((1, 3)))
    ]
    if rng.random() < 0.1:
        values = [f"value {number}" for number in range(rng.choice((1000, 30_000)))]
    return {"enum": values} if rng.random() < 0.5 else {"const": values[0]}


def lark(rng: random.Random) -> str:
    """A Lark grammar: rules and terminals that refer to each other, intersections, complements, embedded JSON."""
    rules = [f"r{number}" for number in range(rng.choice((1, 3, 10, 400)))]
    terminals = [f"T{number}" for number in range(rng.choice((1, 3, 8)))]
    large = len(rules) > 100
    lines = [f"start: {_sequence(rng, rules, terminals, 0)}"]
    for number, rule in enumerate(rules):
        body = (
            f'"a" {rules[number + 1]}'
            if large and number + 1 < len(rules)
            else _sequence(rng, rules, terminals, 0)
        )
        lines.append(f"{rule}{rng.choice(_ATTRIBUTES)}: {body}")
    for number, terminal in enumerate(terminals):
        lines.append(f"{terminal}: {_terminal(rng, terminals[number + 1 :], 0)}")
    if rng.random() < 0.1:
        lines.append(f"%ignore /{_slashed(regex(rng))}/")
    if rng.random() < 0.05:
        lines.append(f"deep: {'(' * (nested := rng.choice((50, 500))) + 'T0' + ')' * nested}")
    return "\n".join(lines)


_ATTRIBUTES = (
    "",
    "",
    "",
    "[lazy]",
    "[max_tokens=5]",
    "[capture]",
    "[temperature=0.5]",
    '[stop="x"]',
    '[suffix="y"]',
)


def _sequence(rng: random.Random, rules: list[str], terminals: list[str], depth: int) -> str:
    if depth > 2:
        return rng.choice((rng.choice(rules), rng.choice(terminals), '"a"', '""', "<|user|>", "<[5]>"))
    parts = [
        rng.choice(
            (
                lambda: rng.choice(rules),
                lambda: rng.choice(terminals),
                lambda: f'"{rng.choice("abc{}é")}"',
                lambda: (
                    f"({_sequence(rng, rules, terminals, depth + 1)}){_repetition(rng).rstrip('?') or '?'}"
                ),
                lambda: (
                    f"({_sequence(rng, rules, terminals, depth + 1)} | {_sequence(rng, rules, terminals, 3)})"
                ),
                lambda: '%json {"type": "object"}',
            )
        )()
        for _ in range(rng.choice((1, 1, 2, 4)))
    ]
    return rng.choice((" ", " ", " | ")).join(parts)


def _terminal(rng: random.Random, below: list[str], depth: int) -> str:
    if depth > 3 or rng.random() < 0.3:
        return rng.choice([f"/{_slashed(regex(rng, 3))}/", '"x"', *below])
    left, right = (_terminal(rng, below, depth + 1) for _ in range(2))
    return rng.choice(
        (f"({left}) & ({right})", f"~({left})", f"({left}) {right}", f"({left} | {right})", f"({left})+")
    )


def _slashed(text: str) -> str:
    return text.replace("/", r"\/").replace("\n", r"\n")


def template(rng: random.Random) -> str:
    """A chat template: loops, macros and expressions whose sizes multiply."""
    return "".join(_statement(rng, 0) for _ in range(rng.choice((1, 2, 4))))


def _statement(rng: random.Random, depth: int) -> str:
    if depth > rng.choice((1, 2, 3)):
        return f"{{{{ {_expression(rng, 0)} }}}}"
    inner = _statement(rng, depth + 1)
    return rng.choice(
        (
            lambda: f"{{{{ {_expression(rng, 0)} }}}}",
            lambda: f"{{% for i in {_many(rng, depth)} %}}{inner}{{% endfor %}}",
            lambda: f"{{% for i in messages recursive %}}{inner}{{{{ loop(messages) }}}}{{% endfor %}}",
            lambda: f"{{% set x = {_expression(rng, 0)} %}}{inner}",
            lambda: (
                f"{{% set n = namespace(v=['a']) %}}{{% for i in range(99) %}}{{% set n.v = n.v {rng.choice('+*')} {rng.choice(('n.v', '9'))} %}}{{% endfor %}}{inner}"
            ),
            lambda: (
                f"{{% macro m(n) %}}{{% if n %}}{{{{ m(n - 1) }}}}{{{{ m(n - 1) }}}}{inner}{{% endif %}}{{% endmacro %}}{{{{ m({rng.choice((3, 40, 2000))}) }}}}"
            ),
            lambda: f"{{% if {_expression(rng, 1)} %}}{inner}{{% endif %}}",
            lambda: f"{{% filter {_filter(rng)} %}}{inner}{{% endfilter %}}",
            lambda: f"{{% call(x) m() %}}{inner}{{% endcall %}}",
            lambda: f"{{% block b{rng.randrange(99)} %}}{inner}{{% endblock %}}",
        )
    )()


def _many(rng: random.Random, depth: int) -> str:
    return rng.choice(
        ("range(99999)", "messages", "'ab' * 9999", f"({_expression(rng, depth + 2)}) | list", "range(9)")
    )


def _filter(rng: random.Random) -> str:
    big = rng.choice(("9", "9999", "10 ** 9", "10 ** 12"))
    return rng.choice(
        (
            f"center({big})", f"indent({big})", f"wordwrap({rng.choice((1, 79))})", f"truncate({big})", "upper", "title", "trim",
            f"replace('a', 'b' * {big})", "urlize", "striptags", "forceescape", "wordcount", "reverse", "length", "tojson(indent=9)",
            "string", "list", "first", "last", "e", "urlencode", "xmlattr", "format(1)", "abs", "int", "float", "round(9)",
        )
    )  # fmt: skip


def _expression(rng: random.Random, depth: int) -> str:
    big = rng.choice(("3", "999", "10 ** 6", "10 ** 10", "messages | length * 10 ** 9"))
    if depth > rng.choice((1, 2, 3)):
        return rng.choice(
            ("'a'", "'{}'", "messages", "messages[0].content", "1", "2.5", "[]", "i", "x", "none", "'%s'")
        )
    left, right = (_expression(rng, depth + 1) for _ in range(2))
    return rng.choice(
        (
            f"({left}) * ({big})", f"({left}) ~ ({right})", f"({left}) + ({right})", f"({left}) % ({right})", f"({big}) ** ({big})",
            f"({left}) | {_filter(rng)}", f"({left}).center({big})", f"({left}).join({_many(rng, depth)})", f"({left}).format({right})",
            f"({left}).replace('', {right})", f"({left}).split()", f"{_many(rng, depth)} | join({right})", f"{_many(rng, depth)} | map('string') | list",
            f"lipsum(n={rng.choice((1, 99, 9999))})", f"range({big}) | list", f"({left}) | batch({rng.choice((1, 9))}, {right}) | list",
            f"strftime_now({left})", f"dict(a={left})", f"cycler({left}).next()", f"joiner({left})()", f"[{left}] * ({big})",
            f"({left}) | tojson(indent={rng.choice(('1', '10 ** 9'))})", f"({left}) | sort | list", f"({left}) | groupby('a') | list",
            f"({left}) | slice({big}) | list", f"({left}).__class__", f"({left}) | attr('__init__')", f"({left}) | sum(start={right})",
            f"({left}) | pprint", f"({left}) | random", f"raise_exception({left})", f"({left}).zfill({big})", f"({left})[::{rng.choice((1, -1))}]",
        )
    )  # fmt: skip


KINDS: dict[str, Callable[[random.Random], Any]] = {
    "schema": schema,
    "lark": lark,
    "regex": regex,
    "template": template,
}
