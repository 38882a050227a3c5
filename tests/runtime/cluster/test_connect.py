"""A cluster that does not answer is told in one line. No test here needs Ray."""

import socket

import pytest

from glm4_runtime.cluster.start import connect
from glm4_runtime.errors import UnavailableError


@pytest.mark.parametrize("port", [0, 1_000_000])
def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch, port):
    monkeypatch.setattr(
        "glm4_runtime.cluster.start.require_ray", lambda: pytest.fail("Ray would wait for a minute")
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    address = f"127.0.0.1:{port or free}"
    with pytest.raises(UnavailableError, match=f"no Ray cluster answers at {address}: "):
        connect(address)


@pytest.mark.parametrize("address", ["auto", None])
def test_any_error_of_ray_is_told_in_one_line(monkeypatch, address):
    class Broken:
        @staticmethod
        def init(**_):
            raise Exception("no token\nand more lines")

    monkeypatch.setattr("glm4_runtime.cluster.start.require_ray", lambda: Broken)
    monkeypatch.setattr("glm4_runtime.cluster.start.os.environ", {})
    with pytest.raises(UnavailableError, match=r"(cannot be joined|can be started): no token$"):
        connect(address)
