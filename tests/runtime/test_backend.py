"""The server knows its backend by one interface, which the local scheduler has."""

import inspect
from typing import get_type_hints

import pytest

from glm4_runtime.backend import Backend, Handle, OpenBundle
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.migration import Migration
from glm4_runtime.scheduler import Scheduler, Ticket
from glm4_runtime.session import Session

IMPLEMENTED = ((Backend, Scheduler), (Handle, Ticket), (Backend, Fleet), (Handle, Migration))


def _methods(kind):
    return {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"}


@pytest.mark.parametrize(("interface", "kind"), IMPLEMENTED)
def test_a_backend_has_each_method_with_the_same_arguments(interface, kind):
    assert _methods(interface)
    for name, method in _methods(interface).items():
        assert inspect.signature(getattr(kind, name)).parameters == inspect.signature(method).parameters, name


def test_a_session_has_what_the_server_reads_of_a_bundle(demo_bundle):
    with Session.open(demo_bundle) as session:
        for name in (*get_type_hints(OpenBundle), "tokenizer", "warnings", "close"):
            assert hasattr(session, name), name
