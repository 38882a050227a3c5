import os

# As in glm4_runtime, which some files here import after onnxruntime: it sends nothing.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
