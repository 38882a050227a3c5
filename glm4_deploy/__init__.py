"""glm4-deploy: GLM-4-0414 checkpoints to ONNX, proved right, served. The commands as Python functions."""


def __getattr__(name: str) -> str:
    """``__version__``, read on first use, because importlib.metadata takes as long as a whole ``--help``."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("glm4-deploy")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+checkout"
