"""glm4-deploy inspect BUNDLE_OR_CHECKPOINT"""

from pathlib import Path
from typing import Any

import click

from glm4_deploy import hub, show
from glm4_deploy.inspect import inspect
from glm4_runtime.errors import some


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--revision", metavar="NAME", help="Branch, tag or commit, if PATH is a name on the hub.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(path: Path, revision: str | None, as_json: bool) -> None:
    """Describe the checkpoint or bundle at PATH. Reads headers and manifests only.

    PATH is a folder, or a name on the hub such as THUDM/GLM-4-9B-0414.
    """
    facts = _facts(path, revision)
    if as_json:
        show.print_json(facts)
    elif facts["kind"] == "bundle":
        show.print_rows(f"bundle {path}", _bundle_rows(facts) + _warning_rows(facts))
    else:
        show.print_rows(f"checkpoint {path}", _checkpoint_rows(facts) + _warning_rows(facts))


def _facts(path: Path, revision: str | None) -> dict[str, Any]:
    if not hub.is_hub_name(path):
        return inspect(hub.local_folder(path, revision))
    with hub.headers_only(path.as_posix(), revision) as folder:
        return inspect(folder) | {"path": path.as_posix()}


def _warning_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [("warning", warning) for warning in facts["warnings"]]


def _checkpoint_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    config = facts["config"]
    heads = f"{config['num_attention_heads']} heads, {config['num_key_value_heads']} for keys and values, of {config['head_dim']}"
    return [
        ("task", facts["task"]),
        (
            "shape",
            f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, MLP {config['intermediate_size']}, vocabulary {config['vocab_size']}",
        ),
        ("attention", f"{heads}{', with bias' if config['attention_bias'] else ''}"),
        ("positions", _positions(facts["max_positions"], config)),
        ("parameters", f"{facts['parameters']:,} in {facts['tensors']} tensors"),
        (
            "stored as",
            ", ".join(f"{name} {show.readable_size(count)}" for name, count in facts["stored_bytes"].items()),
        ),
        *_quantization_rows(facts["quantization"]),
        (
            "weights in",
            ", ".join(
                f"{name} {show.readable_size(count)}" for name, count in facts["bytes_by_precision"].items()
            ),
        ),
        (
            "KV per token",
            ", ".join(
                f"{name} {show.readable_size(count)}" for name, count in facts["kv_bytes_per_token"].items()
            ),
        ),
        *((f"fits {memory}", ", ".join(names) or "nothing") for memory, names in _steps(facts["fits"])),
        ("", "weights and 8192 positions of fp16 cache in 90 % of the memory"),
        ("ends at", _ends(facts["end_tokens"])),
        ("brings", ", ".join(facts["files"]) or "no tokenizer files"),
    ]


def _quantization_rows(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    matrices = "; ".join(f"{count} of {kind}" for kind, count in found["matrices"].items())
    scales = f"; {found['input_scales']} with a scale of their input" if found["input_scales"] else ""
    return [
        ("quantized by", f"{found['method']}: {matrices or 'no matrix'}{scales}"),
        ("not quantized", some(found["left"]) or "no matrix"),
    ]


def _positions(positions: int, config: dict[str, Any]) -> str:
    rope = config["rope_parameters"]
    if rope["rope_type"] != "yarn":
        return str(positions)
    return f"{positions}, by YaRN: factor {rope['factor']:g} x {rope['original_max_position_embeddings']} original positions"


def _steps(fits: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Only the memories at which something more fits than below, and the smallest."""
    shown: list[tuple[str, list[str]]] = []
    for memory, names in fits.items():
        if not shown or len(names) > len(shown[-1][1]):
            shown.append((memory, names))
    return shown


def _bundle_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    manifest, report = facts["manifest"], facts["report"] or {}
    rows = [
        ("task", manifest["task"] + (f", pooling {manifest['pooling']}" if manifest["pooling"] else "")),
        (
            "target",
            f"{manifest['target']}, dialect {manifest['dialect']}, opsets {_pairs(manifest['opsets'])}",
        ),
        (
            "precision",
            f"{manifest['precision']}: {_pairs(manifest['tensor_precisions'])}; activations {manifest['activations']}",
        ),
        ("runs on", _runs_on(manifest)),
        (
            "limits",
            f"{manifest['limits']['max_seq_len']} positions, {manifest['limits']['max_batch_size']} slots",
        ),
        ("ends at", _ends(facts["end_tokens"])),
        ("size", show.readable_size(facts["bytes"])),
        ("each opening checks", _checked(facts["checked_at_opening"])),
    ]
    if facts["kv_bytes_per_token"]:
        rows.append(
            ("KV per token", f"{show.readable_size(facts['kv_bytes_per_token'])} ({manifest['kv_cache']})")
        )
    for side in ("inputs", "outputs"):
        specs = manifest[side]
        rows += [(side if i == 0 else "", _spec(spec)) for i, spec in enumerate(specs[:6])]
        rows += [("", f"and {len(specs) - 6} more like these")] * (len(specs) > 6)
    rows += [
        ("made by", _pairs(manifest["tools"])),
        ("source", f"SHA-256 {manifest['source_sha256']}"),
        *[
            ("adapter" if i == 0 else "", _merged(each))
            for i, each in enumerate(manifest.get("adapters", []))
        ],
        *_adapter_slots(manifest.get("adapter_slots")),
        *_stages(manifest),
        ("parity", _parity(report.get("parity", "not recorded"))),
    ]
    return rows


def _ends(tokens: dict[str, Any]) -> str:
    """The tokens that end a text, and the additional tokens that end a turn of a chat."""
    own = ", ".join(f"{name} ({token})" if name else token for token, name in tokens["model"].items())
    return own + (f"; a chat also at {', '.join(tokens['chat'])}" if tokens["chat"] else "")


CHECKED = {
    "all": "SHA-256 of {}",
    "sample": "size and SHA-256 of 64 blocks of 1 MiB of {}",
    "size": "only the size of {}: export the bundle again for more",
}


def _checked(how: dict[str, str]) -> str:
    files = {kind: [name for name, found in how.items() if found == kind] for kind in CHECKED}
    parts = [CHECKED[kind].format(some(names)) for kind, names in files.items() if names]
    return f"{'; '.join(parts)} (--verify: SHA-256 of all)"


def _runs_on(manifest: dict[str, Any]) -> str:
    engine = manifest["engine"]
    if engine is None:
        return (
            ", ".join(manifest["providers"]) or "none of ONNX Runtime's providers; another conforming runtime"
        )
    gpus = ", ".join(f"{sm[:-1]}.{sm[-1]}" for sm in manifest["compute_capabilities"])
    later = " and newer ones that it names" if engine["later_gpus"] else ""
    return f"{engine['kind']} {engine['version']}, GPUs of compute capability {gpus}{later}"


def _spec(spec: dict[str, Any]) -> str:
    return f"{spec['name']} {spec['dtype']} [{', '.join(map(str, spec['shape']))}]"


def _pairs(mapping: dict[str, Any]) -> str:
    return ", ".join(f"{name or 'ai.onnx'} {value}" for name, value in mapping.items())


def _adapter_slots(slots: dict[str, Any] | None) -> list[tuple[str, str]]:
    if slots is None:
        return []
    return [("adapters", f"{slots['count']} at run time, of rank up to {slots['rank']}")]


def _stages(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Each stage: its layers, and the sizes and hashes of the files that hold its weights."""
    rows: list[tuple[str, str]] = []
    for number, stage in enumerate(manifest.get("stages", []), 1):
        first, names = stage["first_layer"], [profile["file"] for profile in stage.get("profiles", [])]
        layers = f"layers {first} ... {first + stage['layers'] - 1}"
        files = [_sized(name, manifest["files"][name]) for name in dict.fromkeys(names or [stage["weights"]])]
        rows.append(("" if rows else "stages", f"{number}: {layers}, {', '.join(files)}"))
    return rows


def _sized(name: str, entry: dict[str, Any]) -> str:
    return f"{name} of {show.readable_size(entry['bytes'])} with SHA-256 {entry['sha256'][:12]}..."


def _merged(adapter: dict[str, Any]) -> str:
    times = "" if adapter["scale"] == 1 else f" (times {adapter['scale']:g})"
    return f"{adapter['name']}{times}, merged"


def _parity(parity: Any) -> str:
    if not isinstance(parity, dict):
        return str(parity)
    return f"max error {parity['max_abs_error']:.2e} over {parity['positions']} positions ({parity['arithmetic']})"
