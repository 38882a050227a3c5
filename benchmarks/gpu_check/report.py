"""Results as JSON, and as a table for people."""

import json
from pathlib import Path
from typing import Any

# Parts whose records are right or wrong, by their headings.
CHECKS = {
    "correctness": "Correctness",
    "stripped": "The plugin's stripped PTX, launched by the driver",
    "endurance": "The same bits again and again",
    "sanitizer": "compute-sanitizer",
}


def write(results: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """``gpu-check.json`` and ``gpu-check.md`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "gpu-check.json", folder / "gpu-check.md"
    for path, text in ((data, json.dumps(results, indent=1) + "\n"), (page, markdown(results))):
        aside = path.with_name(f".{path.name}")  # a run that is ended meanwhile leaves the results of before
        aside.write_text(text)
        aside.replace(path)
    return data, page


def markdown(results: dict[str, Any]) -> str:
    lines = ["# GPU check", "", ", ".join(f"{k} {v}" for k, v in results["host"].items()), ""]
    if "ceilings" in results:
        ceilings = results["ceilings"]
        lines += [
            f"Device copy {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
            f"bfloat16 product {ceilings['matmul_per_second'] / 1e12:.0f} TFLOP/s, both measured in this run.",
            "",
        ]
    for part, title in CHECKS.items():
        if part in results:
            lines += [*checks(title, results[part]), ""]
    for record in results.get("profile", ()):
        lines += [f"## Nsight Compute: {record['case']}", ""]
        lines += [*(f"- {name}: {value}" for name, value in record["metrics"].items()), ""]
    for part in ("prefill", "decode"):
        if part in results:
            lines += [f"## {part.capitalize()}", "", *table(results[part]), ""]
    if "engines" in results:
        lines += ["## Whole models of the 9B's widths, random weights", "", *models(results["engines"]), ""]
    lines += ["## Refused", ""]
    refused = results["refused"] + [
        f"{record['batch']} x {record['past']}+{record['new']}, {name}: {reason}"
        for part in ("prefill", "decode")
        for record in results.get(part, [])
        for name, reason in record["refused"].items()
    ]
    refused += [f"{reason}, so it was not tried" for reason in results.get("absent", ())]
    lines += [f"- {reason}" for reason in refused] or ["nothing"]
    if results.get("skipped"):
        lines += ["", "## No time was left for", "", *(f"- {name}" for name in results["skipped"])]
    return "\n".join(lines) + "\n"


def checks(title: str, records: list[dict[str, Any]]) -> list[str]:
    """How many are right, and each that is not."""
    wrong = [record for record in records if not record["ok"]]
    lines = [f"## {title}: {len(records) - len(wrong)} of {len(records)} right", ""]
    return lines + [f"- WRONG: {json.dumps(record)}" for record in wrong]


def models(records: list[dict[str, Any]]) -> list[str]:
    """Per bundle: layers, parity against the eager model in float32, milliseconds, and the share of copy bandwidth."""
    lines = [
        "| bundle | layers | mean KL | top-1 | right | prefill, ms by tokens | step, ms by batch | of copy, by batch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        parity = record["parity"]
        cells = [record["bundle"], str(record["layers"]), f"{parity['mean_kl']:.2e}", f"{parity['top1']:.2f}"]
        cells.append("yes" if record["ok"] else "NO")
        cells += [
            ", ".join(f"{size}: {1e3 * value:.2f}" for size, value in record[part].items())
            for part in ("prefill_seconds", "decode_seconds")
        ]
        cells.append(", ".join(f"{size}: {share:.2f}" for size, share in record["of_copy_bandwidth"].items()))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(records: list[dict[str, Any]]) -> list[str]:
    """Milliseconds, RoPE and the append included on both sides, and the ratios."""
    lines = [
        "| batch | past | new | ours, ms | block sizes | torch, ms | backend | ours / torch | of copy | of matmul |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        ours, torchs = (
            min(record[side].items(), key=lambda item: item[1], default=None) for side in ("ours", "torch")
        )
        cells = [record["batch"], record["past"], record["new"]]
        for best in (ours, torchs):
            cells += [f"{best[1]:.4f}", best[0]] if best else ["refused", ""]
        ratios = [record.get(name) for name in ("to_best_torch", "of_copy_bandwidth", "of_matmul_rate")]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines
