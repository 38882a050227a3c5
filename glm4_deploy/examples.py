"""Examples at the end of each command's help: what they do, and the line to type."""

HELP_EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "export": (
        ("int8 for ONNX Runtime", "export THUDM/GLM-4-9B-0414 glm4-int8"),
        ("int4 for our CPU kernels, fitted to a text", "export CHECKPOINT BUNDLE --target cpu --precision int4 --calibration text.txt"),
        ("a TensorRT-RTX engine, without a GPU", "export CHECKPOINT BUNDLE --target tensorrt-rtx --precision fp16"),
        ("the cache key, for CI", "export CHECKPOINT --target cpu --print-key"),
    ),
    "validate": (
        ("accuracy, and where it is lost", "validate BUNDLE --reference CHECKPOINT --layers --html report.html"),
        ("two bundles of one checkpoint", "validate BUNDLE --reference CHECKPOINT --against BUNDLE2"),
        ("a recipe of 5 bits a weight", "validate BUNDLE --reference CHECKPOINT --sensitivity recipe.toml --bits 5"),
    ),
    "eval": (
        ("two bundles on the generated tasks", "eval BUNDLE16 BUNDLE8"),
        ("a gate for CI", 'eval fp16=BUNDLE16 int8=BUNDLE8 --gate "int8: -0.5 points at p < 0.05"'),
    ),
    "generate": (
        ("continue a text", 'generate BUNDLE "In the beginning" --max-tokens 64 --stream'),
        ("answer a question", 'generate BUNDLE "Who are you?" --chat'),
    ),
    "serve": (
        ("on this machine", "serve BUNDLE --port 8000"),
        ("for others, with API keys", "serve BUNDLE --host 0.0.0.0 --api-key-file keys.txt"),
        ("with a prefix cache that outlives the process", "serve BUNDLE --cache DIR --cache-bytes 20G"),
        ("by four replicas", "serve BUNDLE --replicas 4"),
    ),
    "chat": (("in the terminal", "chat BUNDLE"),),
    "cache": (("what is stored", "cache DIR"), ("free the disk", "cache DIR --clear")),
    "triton": (("a repository with one model", "triton BUNDLE models --name glm4"),),
    "bench": (("prompts of 512 tokens, one sequence", "bench BUNDLE --prefill 512 --batch 1"),),
    "bench-serve": (("8 clients at once", "bench-serve http://127.0.0.1:8000 --clients 8"),),
    "inspect": (("what a checkpoint needs", "inspect THUDM/GLM-4-9B-0414"), ("what a bundle is", "inspect BUNDLE --json")),
    "doctor": (("what works here", "doctor"),),
}  # fmt: skip


def epilog(command: str) -> str:
    """The examples of a command, as click's epilog; ``\\b`` keeps the lines as they are."""
    lines = [f"  {meaning}:\n    glm4-deploy {line}" for meaning, line in HELP_EXAMPLES.get(command, ())]
    return "\b\nExamples:\n" + "\n".join(lines)
