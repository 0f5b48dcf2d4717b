"""What the streams of a replica share."""

import threading

import pytest
from prometheus_client import CollectorRegistry

from minwm_session.host import SessionHost
from tests.unit.services.session.conftest import FlatEngine

pytestmark = pytest.mark.unit


def test_the_engine_is_made_and_warmed_up_on_the_thread_that_it_runs_on(registry: CollectorRegistry) -> None:
    """A second thread that computes would cost every chunk as much time again."""
    engine, made_on = FlatEngine(), set[int]()

    def load() -> FlatEngine:
        made_on.add(threading.get_ident())
        return engine

    host = SessionHost(load, idle_seconds=5.0, registry=registry)  # type: ignore[arg-type]
    host.warm_up()
    assert made_on == engine._threads != {threading.get_ident()}
    assert engine.sessions[0].settled == 1 and engine.sessions[0].closed
