"""Generated changes of a sound bundle or checkpoint, each by its seed: what strangers may send.

``CHANGES`` has them by kind. A change writes into a folder of its own, and says in words what it did. Most leave sizes
and hashes that fit, so that the checks behind those are reached.
"""

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from glm4_runtime.bundle.file_names import (
    CONFIG,
    GENERATION_CONFIG,
    GRAPH,
    INDEX,
    MANIFEST,
    SIDE_FILES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
)
from glm4_runtime.bundle.files import file_entry
from glm4_runtime.bundle.graph_checks import OPERATORS

NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 1000, 4096, 65_535, 65_536, 10**6, 2**31 - 1, 2**31, 2**32, 2**33, 2**53,
    2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**18, 10**40, 0.0, 0.5, 1e-9, -0.5, 1e300, 1e-320,
)  # fmt: skip
NAMES = (
    "", "a", "x" * 256, "x" * 1_000_000, "é", "\0", "\n", "..", "../up", "/etc/passwd", "model.onnx", "float32", "int8", "<|user|>",
    "🚀", "\x1b[2J", "NaN", "causal-lm", "cpu", "native", "ort", "tensorrt",
)  # fmt: skip
DEEP = ("[" * 100_000, '{"a":' * 100_000, "[" * 200 + "]" * 200, '{"a":' * 99 + "1" + "}" * 99)
MOST_COPIED = 8 << 20  # bytes of a file that a change may read whole

Change = Callable[[random.Random, Path], str]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value; large ones are rare."""
    roll = rng.random()
    if roll < 0.45:
        return rng.choice(NUMBERS)
    if roll < 0.7:
        return rng.choice(NAMES)
    if roll < 0.8 or depth > 2:
        return rng.choice((None, True, False))
    if roll < 0.9:
        return [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5, 9)))]
    if roll < 0.95:
        return {rng.choice(NAMES): value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3)))}
    return [rng.choice((0, 1, 7))] * rng.choice((100, 100_000))


# JSON ---------------------------------------------------------------------------------------------


def changed_json(rng: random.Random, data: Any) -> str:
    """Change one place of a JSON value; says which."""
    place, where = data, "$"
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            break
        key = rng.choice(keys)
        inner = place[key]
        where += f".{str(key)[:40]}"
        if not (isinstance(inner, dict | list) and inner and rng.random() < 0.85):
            break
        place = inner
    if not (isinstance(place, dict | list) and place):
        return "nothing"
    roll = rng.random()
    if roll < 0.15:
        del place[key]
        return f"without {where}"
    if roll < 0.25 and isinstance(place, dict):
        place[rng.choice(NAMES)] = value(rng)
        return f"more in {where}"
    if roll < 0.35 and isinstance(place[key], int) and not isinstance(place[key], bool):
        place[key] += rng.choice((-1, 1, -64, 64, 1000))
    else:
        place[key] = value(rng)
    return f"{where} = {str(place[key])[:40]!r}"


def change_json_file(rng: random.Random, path: Path) -> str:
    """Other values, or text that is no plain JSON object."""
    roll = rng.random()
    if roll < 0.1:
        path.write_text(rng.choice(DEEP))
        return f"{path.name} is nested"
    if roll < 0.2:
        return change_bytes(rng, path)
    data = json.loads(path.read_text("utf-8")) if path.exists() else {}
    done = [changed_json(rng, data) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
    path.write_text(json.dumps(data), "utf-8")
    return f"{path.name}: {', '.join(done)}"


def change_bytes(rng: random.Random, path: Path) -> str:
    """Bytes that are changed, missing or too many."""
    data = bytearray(path.read_bytes()[:MOST_COPIED]) if path.exists() else bytearray()
    kind = rng.choice(("flip", "cut", "insert", "repeat", "empty"))
    at = rng.randrange(len(data) + 1)
    if kind == "flip":
        for _ in range(rng.choice((1, 3, 30))):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    elif kind == "repeat":
        data[at:at] = data[max(0, at - rng.choice((1, 20, 4000))) : at] * rng.choice((1, 2, 50))
    else:
        data.clear()
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return f"{path.name}: {kind} at {at}"


# Bundles ------------------------------------------------------------------------------------------


def change_manifest(rng: random.Random, folder: Path) -> str:
    return change_json_file(rng, folder / MANIFEST)


def change_numbers(rng: random.Random, folder: Path) -> str:
    """Numbers of the model that agree in model, config, inputs and outputs."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    part = rng.choice(("model", "limits"))
    name = rng.choice([key for key, said in manifest[part].items() if type(said) is int])
    old, new = manifest[part][name], rng.choice([number for number in NUMBERS if type(number) is int])
    manifest[part][name] = new
    if name == "max_seq_len" and rng.random() < 0.5:
        manifest["model"]["max_positions"] = new
    key = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}.get(name, name)  # fmt: skip
    if key in manifest["config"]:
        manifest["config"][key] = new
    for spec in (*manifest["inputs"], *manifest["outputs"]):
        spec["shape"] = [new if axis == old and type(axis) is int else axis for axis in spec["shape"]]
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return f"{part}.{name} = {new} wherever it is said"


def change_graph(rng: random.Random, folder: Path) -> str:
    """Nodes, attributes, constants, inputs and outputs of the graph."""
    model = onnx.load(folder / GRAPH, load_external_data=False)
    done = [rng.choice(GRAPH_CHANGES)(rng, model.graph) for _ in range(rng.choice((1, 1, 2, 4)))]
    (folder / GRAPH).unlink()
    (folder / GRAPH).write_bytes(model.SerializeToString())
    return f"graph: {', '.join(done)}"


def change_graph_bytes(rng: random.Random, folder: Path) -> str:
    return change_bytes(rng, folder / GRAPH)


def change_weights(rng: random.Random, folder: Path) -> str:
    return change_bytes(rng, folder / WEIGHTS)


def change_side_file(rng: random.Random, folder: Path) -> str:
    name = rng.choice([name for name in SIDE_FILES if name.endswith(".json")])
    heavy = rng.choice((TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG))
    return change_json_file(rng, folder / rng.choice((name, heavy)))


def change_files(rng: random.Random, folder: Path) -> str:
    """A file that is missing, too large, a folder or a link."""
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(("missing", "folder", "link", "loop", "pipe", "hole", "extra"))
    if kind == "extra":
        (folder / rng.choice((*SIDE_FILES, "model.safetensors", "x.bin", "x.gguf"))).write_bytes(b"{}")
        return "an extra file"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", "/proc/self/mem", "nowhere", "/dev/null")))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "hole":
        with path.open("wb") as file:
            file.truncate(rng.choice((1, 2**20, 2**30, 2**40)))
    return f"{path.name} is {kind}"


def _an_attribute(rng: random.Random, graph: onnx.GraphProto) -> str:
    nodes = [node for node in graph.node if node.attribute]
    if not nodes:
        return "nothing"
    node = rng.choice(nodes)
    attribute = rng.choice(node.attribute)
    if attribute.type == onnx.AttributeProto.INT:
        numbers = [number for number in NUMBERS if type(number) is int and -(2**63) <= number < 2**63]
        attribute.i = rng.choice(numbers)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice((0.0, -1.0, 1e30, 1e-30, float("nan"), float("inf")))
    elif attribute.type == onnx.AttributeProto.INTS:
        attribute.ints.append(rng.choice((0, 1, -1, 2**62)))
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice(NAMES).encode()[:1000]
    else:
        node.attribute.remove(attribute)
    return f"{node.op_type}.{attribute.name}"


def _an_operator(rng: random.Random, graph: onnx.GraphProto) -> str:
    node = rng.choice(graph.node)
    domain, node.op_type = rng.choice(sorted(rng.choice(sorted(OPERATORS.items()))[1]))
    node.domain = domain
    return f"{node.name[-40:]} is {node.op_type}"


def _an_edge(rng: random.Random, graph: onnx.GraphProto) -> str:
    node = rng.choice([node for node in graph.node if node.input])
    known = [tensor.name for tensor in graph.initializer] + [
        name for each in graph.node for name in each.output
    ]
    known += [spec.name for spec in graph.input] + ["", "unknown"]
    at = rng.randrange(len(node.input))
    if rng.random() < 0.2:
        del node.input[at]
    else:
        node.input[at] = rng.choice(known)
    return f"an input of {node.op_type}"


def _a_node(rng: random.Random, graph: onnx.GraphProto) -> str:
    at = rng.randrange(len(graph.node))
    node = graph.node[at]
    if rng.random() < 0.5:
        graph.node.append(node)
        if rng.random() < 0.7:
            for i in range(len(node.output)):
                graph.node[-1].output[i] = f"again{i}"
        return f"{node.op_type} twice"
    del graph.node[at]
    return "a node less"


def _a_constant(rng: random.Random, graph: onnx.GraphProto) -> str:
    tensor = rng.choice(graph.initializer)
    kind = rng.choice(("dims", "type", "data", "place", "rename", "reshape"))
    if kind == "dims" and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 3, -1, 2**31, 2**62))
    elif kind == "reshape" and tensor.dims:
        size = list(tensor.dims)
        del tensor.dims[:]
        tensor.dims.extend([*size, 1] if rng.random() < 0.5 else reversed(size))
    elif kind == "type":
        tensor.data_type = rng.choice((1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 17, 21, 22, 99))
    elif kind == "data" and tensor.raw_data:
        tensor.raw_data = rng.randbytes(len(tensor.raw_data))
    elif kind == "place" and tensor.external_data:
        entry = rng.choice(tensor.external_data)
        entry.value = rng.choice((*map(str, NUMBERS), *NAMES))[:1000]
    else:
        tensor.name = rng.choice(NAMES)[:1000].replace("\0", "0")
    return f"{tensor.name[:40]}'s {kind}"


def _an_input(rng: random.Random, graph: onnx.GraphProto) -> str:
    specs = rng.choice((graph.input, graph.output))
    if not specs:
        return "nothing"
    spec = rng.choice(specs)
    roll = rng.random()
    if roll < 0.2:
        specs.remove(spec)
    elif roll < 0.4:
        specs.append(spec)
    elif roll < 0.6:
        spec.type.tensor_type.elem_type = rng.choice((1, 3, 6, 7, 10, 16))
    elif spec.type.tensor_type.shape.dim:
        rng.choice(spec.type.tensor_type.shape.dim).dim_value = rng.choice((0, 1, 2**31, 2**62))
    return f"{spec.name}'s declaration"


GRAPH_CHANGES = (_an_attribute, _an_attribute, _an_operator, _an_edge, _an_edge, _a_node, _a_constant, _a_constant, _an_input)  # fmt: skip


# Checkpoints --------------------------------------------------------------------------------------


def change_config(rng: random.Random, folder: Path) -> str:
    return change_json_file(rng, folder / CONFIG)


def change_header(rng: random.Random, folder: Path) -> str:
    """The header of a safetensors file: its JSON, its length, its text."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    said = rng.choice(("values", "values", "values", "text", "length", "many", "twice", "axes"))
    header = json.loads(text)
    if said == "values":
        what = ", ".join(changed_json(rng, header) for _ in range(rng.choice((1, 2, 5))))
        text = json.dumps(header).encode()
    elif said == "many":
        count = rng.choice((1000, 100_000))
        extra = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
        text, what = text[:-1] + b"," + extra.encode() + b"}", f"{count} tensors more"
    elif said == "twice":
        text, what = text[:-1] + b"," + text[1:], "all tensors twice"
    elif said == "axes":
        header[rng.choice(list(header))] = {"dtype": "F32", "shape": [rng.choice((1, 2, 2**62, 10**18))] * rng.choice((9, 300, 20_000, 1_000_000)), "data_offsets": [0, 4]}  # fmt: skip
        text, what = json.dumps(header).encode(), "a shape of many axes"
    elif said == "text":
        text, what = (
            rng.choice((*map(str.encode, DEEP), b"", b"\xff" * 100, b"[]", text + b" " * 100_000)),
            "other text",
        )
    else:
        what = "another length"
    number = rng.choice((0, 1, length + 1, 2**31, 2**62, 2**64 - 1)) if said == "length" else len(text)
    path.unlink()
    path.write_bytes(struct.pack("<Q", number) + text + rest)
    return f"{path.name}: {what}"


def change_index(rng: random.Random, folder: Path) -> str:
    return change_json_file(rng, folder / INDEX)


BUNDLE_CHANGES: dict[str, tuple[Change, ...]] = {
    "manifest": (change_manifest,),
    "numbers": (change_numbers,),
    "graph": (change_graph,),
    "graph bytes": (change_graph_bytes,),
    "weights": (change_weights,),
    "side files": (change_side_file,),
    "files": (change_files,),
    "two at once": (change_graph, change_numbers, change_side_file),
}
CHECKPOINT_CHANGES: dict[str, tuple[Change, ...]] = {
    "config": (change_config,),
    "header": (change_header,),
    "index": (change_index,),
    "side files": (change_side_file,),
    "files": (change_files,),
    "two at once": (change_config, change_header, change_side_file),
}
CHANGES = {"bundle": BUNDLE_CHANGES, "checkpoint": CHECKPOINT_CHANGES}
HASHES_FIT = 0.9  # of the bundles


def forged(sound: Path, folder: Path, what: str, seed: int) -> str:
    """Write a changed copy of ``sound`` into ``folder``; says what was changed."""
    rng = random.Random(f"{what} {seed}")
    _copy(sound, folder)
    kind = rng.choice(list(CHANGES[what]))
    changes = CHANGES[what][kind]
    chosen = changes if len(changes) == 1 else rng.sample(changes, 2)
    done = "; ".join(change(rng, folder) for change in chosen)
    if what == "bundle" and kind not in ("manifest", "files") and rng.random() < HASHES_FIT:
        _make_hashes_fit(folder)
    return f"{kind}: {done}"


def _copy(sound: Path, folder: Path) -> None:
    """Large files are linked: a change replaces a file, and never writes into it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sound.iterdir():
        if path.name in (GRAPH, WEIGHTS) or path.suffix == ".safetensors":
            os.link(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _make_hashes_fit(folder: Path) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text("utf-8"))
    names = {*manifest["files"], *(name for name in SIDE_FILES if (folder / name).is_file())}
    manifest["files"] = {name: vars(file_entry(folder / name)) for name in names if (folder / name).is_file()}
    path.write_text(json.dumps(manifest), "utf-8")


def digest(folder: Path) -> str:
    """Of names and contents of a folder, for a test that equal seeds make equal inputs."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()
