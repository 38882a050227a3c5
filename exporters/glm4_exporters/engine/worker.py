"""The process that builds an engine: a plan as JSON on standard input, progress and the answer on standard output.

    {"progress": [done, total]}  ...  {"files": ..., "layers": ..., ...} or {"error": "one line"}

Run by :func:`glm4_exporters.engine.build.build_engine`, in the folder of the graph.
"""

import contextlib
import hashlib
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from glm4_exporters.engine.gpu import gpu_capability
from glm4_exporters.engine.kinds import ENGINE_KINDS
from glm4_exporters.engine.network import (
    Network,
    check_compiled,
    check_inputs,
    check_layers,
    compiled_weights,
    float32_operators,
    fold_weight_transposes,
)
from glm4_exporters.peak_memory import peak_memory
from glm4_runtime.errors import ExportError

PROGRESS_STEPS = 1000
RAISED_AT = r"[.:]? \(?In \w+ at /| \[\w+\.cpp"
Say = Callable[[dict[str, Any]], None]


def main() -> int:
    say = _claim_stdout()
    plan = json.load(sys.stdin)
    trt = importlib.import_module(ENGINE_KINDS[plan["kind"]].module)
    log = _errors_of(trt)
    try:
        answer = _build(trt, log, plan, say)
    except ExportError as error:
        say({"error": str(error)})
        return 1
    except Exception as error:  # errors of Polygraphy and the bindings, with the library's log
        say({"error": _refusal(plan["kind"], "could not build the engine", [*log.messages, str(error)])})
        return 1
    say(answer)
    return 0


def _claim_stdout() -> Say:
    """Keep standard output for our messages; prints of libraries go to standard error."""
    stream: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with lock:
            stream.write(json.dumps(message) + "\n")
            stream.flush()

    return say


def _build(trt: Any, log: Any, plan: Mapping[str, Any], say: Say) -> dict[str, Any]:
    if plan["plugin"] is not None:
        importlib.import_module(plan["plugin"])
    files = dict.fromkeys(profile["file"] for profile in plan["profiles"])
    capability = gpu_capability() if ENGINE_KINDS[plan["kind"]].times else None
    answer: dict[str, Any] = {"files": {}, "kernels": {}, "weights": {}, "warnings": []}
    for done, name in enumerate(files):
        builder, definition, parser = _parse(trt, log, plan["kind"], plan["graphs"][name])
        network = Network(trt, definition)
        answer["layers"] = check_layers(network, plan["layers"])
        check_inputs(network, [spec["name"] for spec in plan["inputs"]])
        answer["float32"] = float32_operators(network, plan["operators"])
        fold_weight_transposes(network)
        profiles = [profile for profile in plan["profiles"] if profile["file"] == name]
        monitor = _monitor(trt, _reporter(say, done, len(files)))
        config = _config(trt, plan, builder, definition, profiles, monitor)
        parsed = builder, definition
        answer["files"][name] = _write(trt, log, plan["kind"], parsed, config, Path(name))
        names = [profile["name"] for profile in profiles]
        if not ENGINE_KINDS[plan["kind"]].times:  # the full TensorRT logs its layers in another form
            answer["kernels"] |= check_compiled(log.layers, names, plan["operators"])
            answer["weights"] |= compiled_weights(log.layers, names)
        if plan["timing_cache"] is not None:
            warning = save_timing_cache(config, Path(plan["timing_cache"]))
            answer["warnings"] += [warning] if warning else []
        del parser
    _reporter(say, len(files), len(files))(0.0)
    answer["peak_rss_bytes"] = peak_memory()
    answer["capabilities"] = [capability] if capability else []
    return answer


def _reporter(say: Say, done: int, files: int) -> Callable[[float], None]:
    def report(share: float) -> None:
        say({"progress": [round(PROGRESS_STEPS * (done + share) / files), PROGRESS_STEPS]})

    return report


def _errors_of(trt: Any) -> Any:
    """A logger that keeps errors, and the message that lists an engine's layers."""

    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message)
            elif message.startswith("Layers:"):
                self.layers = message

    return Errors()


def _refusal(kind: str, what: str, messages: Sequence[str]) -> str:
    """One line from a library's messages: the first, which names the cause, without the source location."""
    first = next((" ".join(m.split()) for m in messages if m.strip()), "it does not say why")
    return f"{kind} {what}: {re.split(RAISED_AT, first)[0]}"


def _parse(trt: Any, log: Any, kind: str, graph: str) -> tuple[Any, Any, Any]:
    """Builder, network and parser. The parser must live until the build ends: the network reads its mapped weights."""
    builder = trt.Builder(log)
    if not ENGINE_KINDS[kind].times:
        builder.max_threads = (
            1  # threads allocate in a random order, and the order changes the engine's bytes
        )
    flags = getattr(
        trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None
    )  # later versions have no other kind
    definition = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(definition, log)
    if not parser.parse_from_file(graph):  # from the file, so that weights are mapped and not copied
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = [f"{e.node_name()}: {e.desc()}" if e.node_name() else e.desc() for e in errors]
        raise ExportError(_refusal(kind, "does not take the graph", [*said, *log.messages]))
    return builder, definition, parser


def _config(
    trt: Any,
    plan: Mapping[str, Any],
    builder: Any,
    definition: Any,
    profiles: Sequence[Mapping[str, Any]],
    monitor: Any,
) -> Any:
    """Polygraphy's configuration; Polygraphy knows the settings of both libraries."""
    from polygraphy.backend.trt import CreateConfig, Profile

    options: dict[str, Any] = {
        "profiles": [],
        "progress_monitor": monitor,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # so that layers keep the graph's names
    }
    if plan["plugin"] is not None:  # otherwise TensorRT refuses a plugin that writes into an input
        options["preview_features"] = [trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03]
    for profile in profiles:
        made = Profile()
        for spec in plan["inputs"]:
            axes = profile["axes"]
            shapes = [[axes[a][i] if isinstance(a, str) else a for a in spec["shape"]] for i in range(3)]
            made.add(spec["name"], *map(tuple, shapes))
        options["profiles"].append(made)
    if not plan["capabilities"]:
        config = CreateConfig(**options)(builder, definition)
    else:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        pairs = [(int(sm[:-1]), int(sm[-1])) for sm in plan["capabilities"]]
        config = CreateConfigRTX(compute_capabilities=pairs, **options)(builder, definition)
    if plan["timing_cache"] is not None:
        load_timing_cache(config, Path(plan["timing_cache"]))
    return config


def _write(trt: Any, log: Any, kind: str, parsed: tuple[Any, Any], config: Any, path: Path) -> dict[str, Any]:
    """Build into a file and hash on the way, so that the engine is not in memory twice.

    Args:
        parsed: builder and network.

    Returns:
        The file's SHA-256 and size in bytes.
    """
    builder, definition = parsed
    with path.open("xb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)
                self.digest, self.size = hashlib.sha256(), 0
                self.failure: OSError | None = None

            def write(self, data: bytes) -> int:
                try:
                    file.write(data)
                except OSError as error:
                    self.failure = error
                    return 0
                self.digest.update(data)
                self.size += len(data)
                return len(data)

        writer = Writer()
        built = builder.build_serialized_network_to_stream(definition, config, writer)
        if writer.failure is not None:
            raise ExportError(f"the engine could not be written: {writer.failure.strerror}; make room for it")
        if not built or not writer.size:
            raise ExportError(_refusal(kind, "could not build the engine", log.messages))
    return {"sha256": writer.digest.hexdigest(), "bytes": writer.size}


def load_timing_cache(config: Any, path: Path) -> None:
    """Let the build reuse timings. A cache of another TensorRT or GPU is ignored."""
    with contextlib.suppress(OSError):
        stored = config.create_timing_cache(path.read_bytes())
        if stored is not None:
            config.set_timing_cache(stored, ignore_mismatch=False)


def save_timing_cache(config: Any, path: Path) -> str | None:
    """Write the build's timings to a new file, then rename it. A failure is only reported, because the engine exists
    already.

    Returns:
        Why the file was not written, in one line, or None.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with config.get_timing_cache().serialize() as timings:
            aside.write_bytes(timings)
        aside.replace(path)
    except Exception as error:  # the bindings raise errors of their own
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        return f"the timing cache {path} was not written: {' '.join(str(error).split())}"
    return None


def _monitor(trt: Any, report: Callable[[float], None]) -> Any:
    """Progress of the builder's nested phases as one share; every step of a phase counts the same."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}
            self.done: dict[str, int] = {}
            self.shown = -1
            self.lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases[phase_name], self.done[phase_name] = (parent_phase, max(num_steps, 1)), 0

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                self.done[phase_name] = step + 1
                share = self.share()
                if round(PROGRESS_STEPS * share) > self.shown:
                    self.shown = round(PROGRESS_STEPS * share)
                    report(share)
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases.pop(phase_name, None)
                self.done.pop(phase_name, None)

        def share(self) -> float:
            roots = [name for name, (parent, _) in self.phases.items() if parent not in self.phases]
            return min(1.0, max((self.share_of(name) for name in roots), default=0.0))

        def share_of(self, name: str) -> float:
            steps = self.phases[name][1]
            inner = [self.share_of(child) for child, (parent, _) in self.phases.items() if parent == name]
            return min(1.0, (self.done[name] + max(inner, default=0.0)) / steps)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
