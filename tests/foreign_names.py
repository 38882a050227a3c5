"""Which names our sources use of TensorRT, Polygraphy and CUDA, found by reading them, and which of them are not there.

The bindings have no type information for tools, but their docstrings give the types that calls and properties
return. With ``MEANS``, which says what a variable of our sources is, most expressions get a type of the bindings.
An attribute of an expression without a type must be one of our own names or of Python's; else it is reported too,
so that a new use cannot go unseen.
"""

import ast
import builtins
import collections
import contextlib
import hashlib
import importlib
import inspect
import io
import os
import re
import resource
import threading
from pathlib import Path

import fake_tensorrt
import numpy as np
import tensorrt_without_gpu

ROOT = Path(__file__).parents[1]
SESSION, EXPORTERS = "runtime/glm4_runtime/session", "exporters/glm4_exporters"
PLUGIN = "plugins/glm4_plugins/tensorrt.py"
PACKAGES = ("runtime/glm4_runtime", EXPORTERS, "plugins/glm4_plugins")
# By file: the class of an expression of that source, TensorRT's by its name. ``[]`` is an element, "" the module.
_ENGINES = {
    "trt": "", "self.trt": "", "self._runtime": "Runtime", "self._engines[]": "ICudaEngine", "engine": "ICudaEngine",
    "context": "IExecutionContext", "config": "IRuntimeConfig",
}  # fmt: skip
_NETWORK = {
    "trt": "", "self.trt": "", "network.trt": "", "definition": "INetworkDefinition", "layer": "ILayer",
    "self.definition": "INetworkDefinition", "network.definition": "INetworkDefinition", "tensor": "ITensor",
    "weight": "ITensor", "maker": "IShuffleLayer", "maker.__class__": "", "builder": "Builder", "parser": "OnnxParser",
    "config": "IBuilderConfig", "e": "ParserError", "stored": "ITimingCache", "layer.op1": "MatrixOperation",
    "resource.getrusage(resource.RUSAGE_SELF)": resource.struct_rusage, "writer.digest": type(hashlib.sha256()),
}  # fmt: skip
MEANS = {
    f"{SESSION}/tensorrt.py": {
        "trt": "",
        "self._closers": contextlib.ExitStack,
        "undo": contextlib.ExitStack,
    },
    f"{SESSION}/engine_files.py": _ENGINES,
    f"{SESSION}/engine_run.py": {"self._context": "IExecutionContext"},
    f"{SESSION}/kernel_cache.py": {"config": "IRuntimeConfig", "self.cache": "IRuntimeCache"},
    f"{EXPORTERS}/engine/network.py": _NETWORK,
    f"{EXPORTERS}/engine/worker.py": _NETWORK,
    PLUGIN: {
        "named['query']": "plugin.TensorDesc",
        "named['past_key']": "plugin.TensorDesc",
        "named[name]": "plugin.TensorDesc",
        "dimensions": "plugin.Shape",
        "named['query'].dtype": "DataType",
    },
}
# Parts that only one kind of TensorRT runs: by file, its classes; None is the whole file.
ONLY = {
    "tensorrt-rtx": {f"{SESSION}/engine_files.py": ["RtxEngines"], f"{SESSION}/kernel_cache.py": [None]},
    "tensorrt": {PLUGIN: [None]},
}  # fmt: skip
# A layer is handed out as its base class, and the source says what it is.
NARROWED = {"ILayer": ("ILayer", "IMatrixMultiplyLayer")}
PYTHON = (
    str, bytes, int, float, list, dict, set, tuple, re.Match, re.Pattern, Path, io.BufferedWriter, np.ndarray,
    np.dtype, collections.Counter, threading.Lock, BaseException, OSError, memoryview, inspect.Signature, type,
)  # fmt: skip


class Uses(ast.NodeVisitor):
    """Walks one source; ``problems`` are lines that say what is not there."""

    def __init__(self, trt, file, source, ours, skipped=()):
        self.trt, self.file, self.ours, self.skipped = trt, file, ours, set(skipped)
        self.types = {text: self.named(name) for text, name in MEANS.get(file, {}).items()}
        self.dicts, self.problems, self.checked = collections.defaultdict(set), [], set()
        self.visit(ast.parse(source))

    def named(self, name):
        found = self.trt if isinstance(name, str) else name
        for part in filter(None, name.split(".") if isinstance(name, str) else ()):
            found = getattr(found, part)
        return Of(found) if isinstance(found, type) else found

    def problem(self, node, text):
        self.problems.append(f"{self.file}:{node.lineno}: {text}")

    # What is walked ---------------------------------------------------------------------------------

    def visit_ClassDef(self, node):
        if node.name not in self.skipped:
            self.generic_visit(node)

    def visit_Import(self, node):
        for alias in node.names:
            if module := self.imported(node, alias.name):
                self.types[alias.asname or alias.name.partition(".")[0]] = module

    def visit_ImportFrom(self, node):
        module = self.imported(node, node.module)
        for alias in node.names if module else ():
            found = getattr(module, alias.name, None) or self.imported(node, f"{node.module}.{alias.name}")
            self.types[alias.asname or alias.name] = found

    def imported(self, node, name):
        if name.partition(".")[0].startswith("glm4_"):
            return None
        if name.partition(".")[0] == "tensorrt":  # by whatever name these bindings have
            return self.named(name.partition(".")[2])
        try:
            return importlib.import_module(name)
        except ImportError:
            self.problem(node, f"there is no {name}")
            return None

    def visit_Assign(self, node):
        if isinstance(node.value, ast.Dict):
            keys = {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
            self.dicts[ast.unparse(node.targets[0])] |= keys
        target = node.targets[0]
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            self.dicts[ast.unparse(target.value)].add(target.slice.value)
        for one in node.targets:
            self.type_of(one)
        found = self.type_of(node.value)
        if isinstance(target, ast.Name) and not isinstance(found, Nothing):
            self.types.setdefault(target.id, found)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit_Assign(ast.Assign([node.target], node.value))

    def visit_Attribute(self, node):
        self.type_of(node)

    def visit_Call(self, node):
        self.type_of(node)

    # What an expression is -----------------------------------------------------------------------------

    def type_of(self, node):
        text = ast.unparse(node)
        if text not in self.types:
            text = TEXT.sub("[]", text)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, text)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 2:
                owner, name = node.args
                if isinstance(name, ast.Constant):  # asked without a default, so it must be there
                    return self.type_of(ast.copy_location(ast.Attribute(owner, name.value, ast.Load()), node))
            return self.types.get(text) or self.call(node)
        self.generic_visit(node)
        if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
            return self.types.get(node.id, NOTHING)
        return self.types.get(text, NOTHING) if isinstance(node, ast.Subscript) else NOTHING

    def attribute(self, node, text):
        base, name = self.type_of(node.value), node.attr
        if isinstance(base, Nothing):
            if name not in self.ours and text not in self.types:
                self.problem(node, f"what is {ast.unparse(node.value)}, that it has {name}? Say so in MEANS")
            return self.types.get(text, NOTHING)
        owners = [base]
        if isinstance(base, Of):
            owners = [getattr(self.trt, n) for n in NARROWED.get(base.kind.__name__, ())] or [base.kind]
        self.checked.add(name)
        found = next((getattr(owner, name) for owner in owners if hasattr(owner, name)), NOTHING)
        if isinstance(found, Nothing):
            self.problem(node, f"{owners[0].__name__} has no {name}")
        if text in self.types:
            return self.types[text]
        return self.returned(found.fget) if isinstance(found, property) else found

    def call(self, node):
        made = self.type_of(node.func)
        for argument in node.args:
            self.type_of(argument)
        for keyword in node.keywords:
            self.type_of(keyword.value)
        if isinstance(made, Nothing | Of):
            return NOTHING
        names = {k.arg for k in node.keywords if k.arg}
        for keyword in node.keywords:
            names |= set() if keyword.arg else self.dicts[ast.unparse(keyword.value)]
        known = keywords_of(made)
        self.checked |= names
        for name in sorted(names - known) if known is not None else ():
            self.problem(node, f"{made.__name__} takes no {name}")
        if isinstance(made, type):
            return Of(made) if made.__module__.startswith(self.trt.__name__.partition(".")[0]) else NOTHING
        return self.returned(made)

    def returned(self, function):
        """What a function of the bindings gives, by its docstring."""
        name = re.search(r"\) -> ([\w.:]+)", getattr(function, "__doc__", None) or "")
        kind = getattr(self.trt, re.split(r"[.:]", name[1])[-1], None) if name else None
        return Of(kind) if isinstance(kind, type) else NOTHING


class Of:
    """An object of a class."""

    def __init__(self, kind):
        self.kind = kind


class Nothing:
    """An expression that is not of the foreign API, or may not be."""


NOTHING = Nothing()
TEXT = re.compile(r"\[[^\[\]]*\]")


def keywords_of(function):
    """Names that a call may pass; None where nothing tells."""
    text = (function.__init__ if isinstance(function, type) else function).__doc__ or ""
    signature = re.findall(
        rf"{getattr(function, '__name__', '')}\((self: .*)\) ->|__init__\((self: .*)\) ->", text
    )
    if signature:
        return set(re.findall(r"(\w+): ", " ".join("".join(s) for s in signature))) | {"self"}
    names = set()
    for one in (kind.__init__ for kind in function.__mro__) if isinstance(function, type) else (function,):
        try:
            parameters = inspect.signature(one).parameters.values()
        except (TypeError, ValueError):
            return None
        names |= {p.name for p in parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None


def own_names():
    """Every name that our packages define or set, and those of Python's own types."""
    names = {name for kind in PYTHON for name in dir(kind)}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
    return names


def problems_of(kind, folder, sources=None):
    """What our sources use of one kind of TensorRT that its bindings do not have, and all names that were checked.

    Loads the bindings, so a process can ask for one kind only.

    Args:
        kind: ``tensorrt`` or ``tensorrt-rtx``.
        folder: where :mod:`tensorrt_without_gpu` built its libraries.
        sources: texts by file, in place of those in ``MEANS``.
    """
    trt = loaded(kind, folder)
    others = {name: parts for other, files in ONLY.items() if other != kind for name, parts in files.items()}
    ours, problems, checked = own_names(), [], set()
    for file in MEANS:
        skipped = others.get(file, [])
        if None in skipped:
            continue
        source = (sources or {}).get(file) or (ROOT / file).read_text()
        uses = Uses(trt, file, source, ours, skipped)
        problems, checked = problems + uses.problems, checked | uses.checked
    return problems, sorted(checked)


def loaded(kind, folder):
    """The real bindings of one kind."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(kind == "tensorrt-rtx"))
    return (
        importlib.import_module("tensorrt_rtx")
        if kind == "tensorrt-rtx"
        else tensorrt_without_gpu.load(folder)
    )


def invented_by_the_stand_ins(kind, folder, _):
    """Public names of :mod:`fake_tensorrt`'s classes that their originals in the real bindings lack."""
    trt, invented = loaded(kind, folder), []
    for name, original in fake_tensorrt.ORIGINALS[kind].items():
        real = getattr(trt, original) if original else trt
        for base in getattr(fake_tensorrt, name).__mro__:
            ours = vars(base) if base.__module__ == fake_tensorrt.__name__ else ()
            invented += [f"{name}.{n}" for n in ours if not n.startswith("_") and not hasattr(real, n)]
    return invented
