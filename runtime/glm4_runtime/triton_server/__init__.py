"""Runs a bundle inside NVIDIA's Triton Inference Server, as a model of its Python backend.

model.py      what Triton calls, for the task of the bundle
generating.py a causal LM: requests share the slots of one session, answers are streamed
pooling.py    classifiers and encoders
inputs.py     reads a request's tensors
"""

BUNDLE = "bundle"  # the bundle's folder, beside model.py
