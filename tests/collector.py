"""An OpenTelemetry collector on loopback, which keeps the spans that it gets."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector(ThreadingHTTPServer):
    """
    Attributes:
        paths: of the requests. ``bodies``: their bytes. ``headers``: their headers.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths, self.bodies, self.headers = [], [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def resources(self):
        """Each resource's attributes, with its spans."""
        found = []
        for body in self.bodies:
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans = [span for scope in group.scope_spans for span in scope.spans]
                found.append((attributes(group.resource), spans))
        return found

    @property
    def spans(self):
        return [span for _, spans in self.resources for span in spans]


def attributes(thing):
    """The attributes of a resource, a span or an event, as a dictionary."""
    return {pair.key: _value(pair.value) for pair in thing.attributes}


def _value(value):
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [_value(one) for one in found.values] if kind == "array_value" else found


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.paths.append(self.path)
        self.server.headers.append(dict(self.headers))
        self.server.bodies.append(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        """Nothing."""


@contextlib.contextmanager
def collecting():
    collector = Collector()
    thread = threading.Thread(target=collector.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.shutdown()
        collector.server_close()
        thread.join()
