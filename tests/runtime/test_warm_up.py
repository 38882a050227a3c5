"""Servers run a first step before they are ready."""

from types import SimpleNamespace

import pytest

from glm4_runtime.errors import RequestError
from glm4_runtime.server import ServerOptions
from glm4_runtime.server import run as module
from glm4_runtime.session import Session
from glm4_runtime.session.ort import OrtSession
from glm4_runtime.session.warm_up import warm_up


def test_a_step_runs_and_leaves_all_slots_free(demo_bundle):
    ids = [5, 6, 7]
    with Session.open(demo_bundle) as session:
        cold = session.prefill(0, ids)
    with Session.open(demo_bundle) as session:
        run, steps = session._run_decoder, []
        session._run_decoder = lambda *given: (steps.append(given), run(*given))[1]
        warm_up(session)
        assert len(steps) == 1
        assert session.length(0) == 0
        assert (session.prefill(0, ids) == cold).all()


def test_a_server_is_ready_after_the_step(demo_bundle, monkeypatch):
    order = []
    monkeypatch.setattr(module, "warm_up", lambda _: order.append("step"))
    monkeypatch.setattr(module, "serve", lambda *_: order.append("serve"))
    module.open_and_serve(demo_bundle, ServerOptions(port=0))
    assert order == ["step", "serve"]


def test_a_step_that_fails_ends_the_start(demo_bundle, monkeypatch):
    monkeypatch.setattr(Session, "prefill", lambda *_: (_ for _ in ()).throw(RequestError("not finite")))
    opened, close = [], OrtSession.close
    monkeypatch.setattr(OrtSession, "close", lambda session: (opened.append(session), close(session))[1])
    with pytest.raises(RequestError, match="not finite"):
        module.open_and_serve(demo_bundle, ServerOptions(port=0))
    assert len(opened) == 1, "the session is left open"


def test_a_model_without_a_cache_runs_none():
    warm_up(SimpleNamespace(manifest=SimpleNamespace(task="token-classification")))
