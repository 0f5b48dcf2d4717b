"""What the streams of a replica share."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from minwm.errors import SessionError
from minwm.streaming import Chunk, StreamingEngine, Turn, load_world
from minwm_session.host import SessionHost

pytestmark = pytest.mark.unit


class Watched(StreamingEngine):
    """Takes note of the threads that it runs on."""

    def __init__(self, *args: Any) -> None:
        self.threads = {threading.get_ident()}
        super().__init__(*args)

    def advance(self, turns: Sequence[Turn]) -> list[Chunk | SessionError]:
        self.threads.add(threading.get_ident())
        return super().advance(turns)


def test_the_engine_is_made_and_warmed_up_on_the_thread_that_it_runs_on(
    tiny_world: Path, registry: CollectorRegistry
) -> None:
    """A second thread that computes would cost every chunk as much time again."""
    host = SessionHost(lambda: Watched(load_world(tiny_world), 2), idle_seconds=5.0, registry=registry)
    host.warm_up()
    assert isinstance(host.engine, Watched)
    assert len(host.engine.threads) == 1 and threading.get_ident() not in host.engine.threads
    assert host.engine.free_slots == 2
    assert registry.get_sample_value("minwm_warm_up_seconds") > 0  # type: ignore[operator]
