"""A stand-in of ``triton_python_backend_utils``, the module that exists only inside Triton: what our model uses of it."""

import queue
import sys
import types

import numpy as np

FINAL = 1


class Tensor:
    def __init__(self, name, values):
        assert values.dtype != np.dtype("U")
        self._name, self._values = name, values

    def name(self):
        return self._name

    def as_numpy(self):
        return self._values


class TritonError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE = "internal", "invalid argument", "unavailable"

    def __init__(self, message, code=INTERNAL):
        super().__init__(message)
        self.code = code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.error = error
        self.values = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}


class Sender:
    """Nothing may be sent after the final flag."""

    def __init__(self):
        self.responses, self.closed, self.cancelled = queue.Queue(), False, False

    def send(self, response=None, flags=0):
        assert not self.closed
        self.closed = flags == FINAL
        self.responses.put((response, flags))

    def is_cancelled(self):
        return self.cancelled


class Request:
    def __init__(self, inputs, parameters="", outputs=()):
        self.inputs = {name: Tensor(name, np.array(value)) for name, value in inputs.items()}
        self._parameters, self._outputs, self.sender = parameters, list(outputs), Sender()

    def get_response_sender(self):
        return self.sender

    def parameters(self):
        return self._parameters

    def requested_output_names(self):
        return self._outputs

    def all_responses(self, timeout=60):
        """Every response up to the final one."""
        found = []
        while True:
            response, flags = self.sender.responses.get(timeout=timeout)
            if response is not None:
                found.append(response)
            if flags == FINAL:
                return found


def get_input_tensor_by_name(request, name):
    return request.inputs.get(name)


def install(monkeypatch):
    module = types.ModuleType("triton_python_backend_utils")
    for each in (Tensor, TritonError, InferenceResponse, get_input_tensor_by_name):
        setattr(module, each.__name__, each)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    monkeypatch.setitem(sys.modules, module.__name__, module)
