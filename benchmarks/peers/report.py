"""What the rounds say: medians with spread, ratios within rounds, a table and a plot."""

import json
import statistics
from pathlib import Path
from typing import Any

RATES = ("prefill 512", "prefill 2048", "decode 1", "decode 4", "decode 8")

# A result of long contexts names its own columns.
COSTS = {"peak_gb": "peak GB", "load_s": "load s"}


def rates(result: dict[str, Any]) -> tuple[str, ...]:
    return tuple(result.get("columns", RATES))


def values(result: dict[str, Any], name: str, column: str) -> list[float]:
    turns = (figures["contenders"].get(name) for figures in result["rounds"])
    return [turn[column] for turn in turns if turn]


def ratios(result: dict[str, Any], name: str, column: str) -> list[float]:
    """Ours over it, in every round that has both."""
    rounds = (figures["contenders"] for figures in result["rounds"])
    ours = result["ours"]
    return [one[ours][column] / one[name][column] for one in rounds if ours in one and name in one]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Median, least and most of every figure, and the median ratio of ours to it, by contender."""
    table: dict[str, Any] = {}
    for name in result["contenders"]:
        if not values(result, name, "load_s"):
            continue
        row = table[name] = {}
        for column in (*rates(result), *COSTS):
            found, ours = values(result, name, column), ratios(result, name, column)
            row[column] = {"median": statistics.median(found), "min": min(found), "max": max(found)}
            row[column]["ours_over_it"] = statistics.median(ours) if ours else None
    return table


def write_report(result: dict[str, Any], out: Path) -> None:
    """OUT.json, OUT.md and OUT.svg, as far as the rounds have come."""
    table = summary(result)
    out.with_suffix(".json").write_text(json.dumps({**result, "summary": table}, indent=2) + "\n")
    out.with_suffix(".md").write_text(page(result, table, out))
    if table:
        plot(result, table, out.with_suffix(".svg"))


def page(result: dict[str, Any], table: dict[str, Any], out: Path) -> str:
    turns = [turn for figures in result["rounds"] for turn in figures["contenders"].values()]
    spread = ", ".join(
        f"{label} {min(found):.0f} to {max(found):.0f} {unit}"
        for label, found, unit in (
            ("memory read at", [turn["bandwidth"] for turn in turns], "GB/s"),
            ("8-bit products at", [figures["integer_gemm"] for figures in result["rounds"]], "Gop/s"),
        )
        if found
    )
    others = [turn["cores_of_others"] for turn in turns] or [0.0]
    cap = f", limited to {result['cap']}" if result.get("cap") else ""
    lines = [
        f"# {result['ours']} and the peers on {result['checkpoint']}",
        "",
        f"{result['date']}, {result['machine']}, {result['threads']} threads{cap}, rounds: {len(result['rounds'])}; {spread}; "
        f"other processes kept {min(others):.2f} to {max(others):.2f} cores busy during a turn.",
        "",
        f"    {result['command']}",
        "",
        f"Tokens per second, of all sequences together, medians (least to most); decode after {behind(result)}, "
        f"{result['steps']} steps. Memory is each process's peak, mapped files included; made s is what exporting or converting the checkpoint "
        "took, once.",
        "",
        *rows(
            rates(result),
            ("made s",),
            [
                (
                    name,
                    *(figure(column, row[column]) for column in (*rates(result), *COSTS)),
                    made(result, name),
                )
                for name, row in table.items()
            ],
        ),
        "",
        "Ours over each peer, the median of the rounds' ratios; for memory and loading, less is better:",
        "",
        *rows(
            rates(result),
            (),
            [
                (name, *(ratio(row[column]) for column in (*rates(result), *COSTS)))
                for name, row in table.items()
                if name != result["ours"]
            ],
        ),
        "",
        f"![tokens per second]({out.with_suffix('.svg').name})",
        "",
    ]
    for name, about in result["contenders"].items():
        versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
        lines.append(f"- {name}: {'; '.join(filter(None, (versions, about['note'])))}")
    lines += [f"- failed: {failure}" for failure in result["failures"]]
    return "\n".join([*lines, ""])


def behind(result: dict[str, Any]) -> str:
    """What the sequences that decode hold."""
    return "the long prompt" if "columns" in result else f"{result['context']} tokens"


def rows(measured: tuple[str, ...], beyond: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    """A table of the measured columns and those ``beyond`` them."""
    head = ("", *measured, *COSTS.values(), *beyond)
    return [f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *body)]


def made(result: dict[str, Any], name: str) -> str:
    """Seconds of a peer's conversion or of our export; empty where nothing says."""
    seconds = result["contenders"][name]["convert_s"]
    return "" if seconds is None else f"{seconds:.0f}"


def figure(column: str, one: dict[str, float]) -> str:
    digits = 2 if column in COSTS else 0 if one["median"] >= 100 else 1
    median, least, most = (f"{one[key]:.{digits}f}" for key in ("median", "min", "max"))
    return median if column in COSTS else f"{median} ({least}–{most})"


def ratio(one: dict[str, float | None]) -> str:
    return "" if one["ours_over_it"] is None else f"{one['ours_over_it']:.2f}"


def plot(result: dict[str, Any], table: dict[str, Any], file: Path) -> None:
    """One panel per column, a bar per contender with its spread, ours in another colour."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "glm4-deploy"
    import matplotlib.pyplot as plt

    names, columns = list(table)[::-1], rates(result)
    figure, panels = plt.subplots(
        1, len(columns), figsize=(13, 1.2 + 0.32 * len(names)), sharey=True, layout="constrained"
    )
    for panel, column in zip(panels, columns, strict=True):
        cells = [table[name][column] for name in names]
        medians = [cell["median"] for cell in cells]
        spread = [
            [cell["median"] - cell["min"] for cell in cells],
            [cell["max"] - cell["median"] for cell in cells],
        ]
        colours = ["#1f6feb" if name.startswith("ours:") else "#b0b8c4" for name in names]
        panel.barh(names, medians, xerr=spread, color=colours, error_kw={"ecolor": "#444444", "capsize": 2})
        panel.set_title(column, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.supxlabel(f"tokens/s, median with the spread; rounds: {len(result['rounds'])}", fontsize=9)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
