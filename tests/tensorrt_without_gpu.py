"""NVIDIA's plugin registration and our plugins in it, run without a GPU and without full TensorRT.

TensorRT's Python bindings need three libraries, of which plugins use the registry only. The lean runtime, whole on
the package index, has that. What it lacks, factories for builders and parsers and a few others, are functions here
that return nothing, in libraries with the sonames that the bindings ask for.
"""

import ctypes
import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy

FACTORY = "void* {}(void) {{ return 0; }}"
LIBRARIES = {
    "libnvinfer": ("createInferBuilder_INTERNAL", "getBuilderPluginRegistry"),
    "libnvinfer_plugin": ("initLibNvInferPlugins",),
    "libnvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}


def missing():
    """Why it cannot be done here, or None."""
    for module, package in (
        ("tensorrt_bindings", "tensorrt-cu13-bindings"),
        ("tensorrt_lean_libs", "tensorrt-lean-cu13-libs"),
        ("triton", "triton"),
    ):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    return None if shutil.which("gcc") else "there is no gcc"


def _lean():
    """The lean runtime's library, whose suffix is TensorRT's major version."""
    folder = Path(importlib.util.find_spec("tensorrt_lean_libs").submodule_search_locations[0])
    (found,) = folder.glob("libnvinfer_lean.so.*")
    return found


def build(folder):
    """Compile the three libraries into ``folder``."""
    lean = _lean()
    for name, functions in LIBRARIES.items():
        library = f"{name}.so{lean.suffix}"
        source = Path(folder, f"{library}.c")
        source.write_text("\n".join(FACTORY.format(name) for name in functions))
        linked = [str(lean), f"-Wl,-rpath,{lean.parent}"] if name == "libnvinfer" else []
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library}", "-Wl,--no-as-needed"]
        subprocess.run(["gcc", *flags, source, *linked, "-o", Path(folder, library)], check=True)


def load(folder):
    """``tensorrt`` and ``tensorrt.plugin`` become importable in this process."""
    for name in LIBRARIES:
        ctypes.CDLL(str(Path(folder, f"{name}.so{_lean().suffix}")), mode=ctypes.RTLD_GLOBAL)
    sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return sys.modules["tensorrt"]


class Expressions:
    """TensorRT's expression builder, whose expressions evaluate themselves for concrete dimensions."""

    def __init__(self, trt):
        operation = trt.DimensionOperation
        self.meanings = {
            operation.SUM: lambda a, b: a + b,
            operation.SUB: lambda a, b: a - b,
            operation.PROD: lambda a, b: a * b,
            operation.MAX: max,
            operation.MIN: min,
            operation.EQUAL: lambda a, b: int(a == b),
            operation.LESS: lambda a, b: int(a < b),
            operation.FLOOR_DIV: lambda a, b: a // b,
            operation.CEIL_DIV: lambda a, b: -(-a // b),
        }

        class Expression(trt.IDimensionExpr):
            def is_constant(self):
                return False

        self.kind = Expression

    def make(self, evaluate):
        # The class is TensorRT's and abstract there; the bindings only ask for its type.
        expression = self.kind.__new__(self.kind)
        expression.evaluate = evaluate
        return expression

    def constant(self, value):
        return self.make(lambda _: value)

    def dimension(self, name):
        return self.make(lambda values: values[name])

    def operation(self, kind, a, b):
        return self.make(lambda values: self.meanings[kind](a.evaluate(values), b.evaluate(values)))


class Sizes(dict):
    """What TensorRT's list of size arguments is asked: a count, and items set by index."""

    nbSymExprs = 0


class Plugin:
    """A plugin object made by the registry, walked through what a build asks of it."""

    def __init__(self, trt, name, attributes):
        from tensorrt_bindings.plugin import _tensor

        self.trt, self.expressions = trt, Expressions(trt)
        kinds = {int: trt.PluginFieldType.INT64, str: trt.PluginFieldType.CHAR}
        fields = [
            trt.PluginField(
                key, value.encode() if isinstance(value, str) else numpy.array([value]), kinds[type(value)]
            )
            for key, value in attributes.items()
        ]
        creator = trt.get_plugin_registry().get_creator(name, "1", "glm4")
        self.real = creator.create_plugin(
            *(name, "glm4", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD),
            trt.QuickPluginCreationRequest.STRICT_AOT,
        )
        trt.DimsExprs = lambda length: [None] * length
        to_native = _tensor.SymExprImpl

        class Recorded(to_native):  # the native object keeps a pointer; we want the expression
            def __init__(self, expression):
                super().__init__(expression)
                self.evaluate = expression._expr.evaluate

        _tensor.SymExprImpl = Recorded

    def outputs(self, inputs):
        """Types, shapes in expressions and aliases of the outputs; ``inputs`` are (type, dimensions)."""
        types = self.real.get_output_data_types([t for t, _ in inputs], [len(s) for _, s in inputs])
        shapes = self.real.get_output_shapes([self._expressed(s) for _, s in inputs], [], self.expressions)
        return types, shapes, [self.real.get_aliased_input(i) for i in range(len(types))]

    def _expressed(self, shape):
        build = self.expressions
        return [build.constant(d) if isinstance(d, int) else build.dimension(d) for d in shape]

    def described(self, tensors, limits):
        """TensorRT's descriptors of (type, dimensions); a named dimension has its minimum and maximum in ``limits``."""
        descriptors = []
        for kind, shape in tensors:
            d = self.trt.DynamicPluginTensorDesc()
            d.desc.type, d.desc.format = kind, self.trt.TensorFormat.LINEAR
            d.desc.dims = [n if isinstance(n, int) else -1 for n in shape]
            for i, name in enumerate(("min", "max")):
                setattr(d, name, self.trt.Dims([n if isinstance(n, int) else limits[n][i] for n in shape]))
            d.opt = d.max
            descriptors.append(d)
        return descriptors

    def launch(self, descriptors, inputs, tactic):
        """Kernel name, PTX, launch parameters by name and sizes, both as expressions."""
        parameters, setter = SimpleNamespace(), Sizes()
        self.real.set_tactic(tactic)
        self.real.get_launch_params(None, descriptors, inputs, parameters, setter, self.expressions)
        flat = [d.desc for d in descriptors]
        name, code = self.real.get_kernel(flat[:inputs], flat[inputs:])
        return name, code.decode(), vars(parameters), [setter[i] for i in range(setter.nbSymExprs)]


def explored(folder, name, attributes, inputs, outputs, limits, points, all_tactics):
    """All that a build would learn of a plugin, as plain data; runs in a process of its own.

    ``inputs`` and ``outputs`` are (type's name, dimensions, of which some have names), ``limits`` those names'
    minima and maxima, and ``points`` values for them at which expressions are evaluated. Without
    ``all_tactics`` only the kernel of the first is compiled.
    """
    trt = sys.modules.get("tensorrt") or load(folder)
    importlib.import_module("glm4_plugins.tensorrt")
    plugin = Plugin(trt, name, attributes)
    tensors = [(getattr(trt.DataType, kind), shape) for kind, shape in (*inputs, *outputs)]
    types, shapes, aliases = plugin.outputs(tensors[: len(inputs)])
    descriptors = plugin.described(tensors, limits)
    supported = plugin.real.get_supported_format_combinations(descriptors, len(inputs))
    plugin.real.configure_plugin(descriptors[: len(inputs)], descriptors[len(inputs) :])
    launches = {}
    for tactic in (0, *plugin.real.get_valid_tactics()) if all_tactics else (0,):
        kernel, ptx, parameters, sizes = plugin.launch(descriptors, len(inputs), tactic)
        launches[tactic] = dict(
            kernel=kernel,
            ptx=ptx,
            parameters=[{key: e.evaluate(point) for key, e in parameters.items()} for point in points],
            sizes=[[size.evaluate(point) for size in sizes] for point in points],
        )
    return dict(
        types=[t.name for t in types],
        shapes=[[[d.evaluate(point) for d in shape] for shape in shapes] for point in points],
        aliases=aliases,
        supported=[(d.type.name, d.format.name) for d in supported],
        tactics=plugin.real.get_valid_tactics(),
        launches=launches,
    )


def registered(folder):
    """The names of our plugins in TensorRT's registry, with their attributes."""
    trt = sys.modules.get("tensorrt") or load(folder)
    importlib.import_module("glm4_plugins.tensorrt")
    creators = [c for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == "glm4"]
    return {c.name: [field.name for field in c.field_names] for c in creators}
