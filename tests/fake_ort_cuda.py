"""ONNX Runtime with a CUDA provider made of its CPU provider and the memory of a :mod:`fake_cuda`.

A run goes to the stream that the provider was given and is done when somebody waits for that stream: a session
that reads logits or moves the cache without an order between them is seen. As in ONNX Runtime, an input bound on the
host is copied when it is bound, and an output bound on the host is written by the run.
"""

import ctypes

import numpy as np
import onnxruntime

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]
OPTIONS = {"user_compute_stream", "arena_extend_strategy"}  # those that the real provider has and we use


class FakeSession:
    def __init__(self, cuda, path, options, providers):
        (provider,) = providers
        self.cuda, self.told, self.stream, self.entries = cuda, {}, None, {}
        self.provider = provider if isinstance(provider, str) else provider[0]
        self.on_gpu = self.provider == PROVIDERS[0]
        if self.on_gpu:
            self.told = provider[1]
            assert set(self.told) <= OPTIONS
            self.stream = int(self.told["user_compute_stream"])
            assert self.stream in cuda.queues, "a stream that does not exist"
        self.real = REAL(path, options, providers=["CPUExecutionProvider"])
        self.input_types = {i.name: i.type for i in self.real.get_inputs()}

    def get_providers(self):
        return PROVIDERS if self.on_gpu else PROVIDERS[1:]

    def io_binding(self):
        return FakeBinding(self)

    def run(self, names, feeds):
        return self.real.run(names, feeds)

    def run_with_iobinding(self, binding):
        bound = {side: dict(getattr(binding, side)) for side in ("inputs", "outputs")}

        def job():
            real = self.real.io_binding()
            for name, (dtype, shape, address) in bound["inputs"].items():
                real.bind_input(name, "cpu", 0, dtype, shape, address)
            for name, (dtype, shape, address) in bound["outputs"].items():
                real.bind_output(name, "cpu", 0, dtype, shape, address)
            self.real.run_with_iobinding(real)

        self.send(job)

    def send(self, job):
        if self.on_gpu:
            self.cuda.enqueue(self.stream, job)
        else:
            job()


class FakeBinding:
    def __init__(self, session):
        self.session, self.inputs, self.outputs, self.kept = session, {}, {}, {}

    def bind_input(self, name, device, device_id, dtype, shape, address):
        if (
            device == "cpu" and self.session.on_gpu
        ):  # copied now: what is written to the array later is not seen
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.kept[name] = ctypes.create_string_buffer(ctypes.string_at(address, size), size)
            self.session.cuda.enqueue(self.session.stream, lambda kept=self.kept[name]: kept)  # lives so long
            address = ctypes.addressof(self.kept[name])
        self.inputs[name] = dtype, shape, address

    def bind_output(self, name, device, device_id, dtype, shape, address):
        self.outputs[name] = dtype, shape, address


REAL = onnxruntime.InferenceSession


def install(monkeypatch, cuda):
    """onnxruntime has the CUDA provider; returns the list of sessions made."""
    made, entries = [], {}

    def session(path, options, providers):
        made.append(FakeSession(cuda, path, options, providers))
        return made[-1]

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            entries[key] = value
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: PROVIDERS)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    return made, entries
