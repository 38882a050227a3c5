"""Where the stages of a bundle run."""

PROCESS, RAY = "process", "ray"
PLACES = (PROCESS, RAY)
