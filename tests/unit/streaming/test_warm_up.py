"""What an engine does before anybody waits for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minwm.errors import ConfigError, SessionError
from minwm.geometry.live import CameraVelocity
from minwm.streaming import Chunk, Fidelity, StreamingEngine, Turn, load_world, warm_up

pytestmark = pytest.mark.unit


def test_it_tells_its_seconds_for_every_number_of_sessions_and_fidelity(tiny_world: Path) -> None:
    engine = StreamingEngine(load_world(tiny_world, torch.float32), slots=3)
    spent = warm_up(engine, (1, 3), (Fidelity(steps=1), Fidelity(steps=2, window=2)))
    assert set(spent) == {(n, each) for n in (1, 3) for each in (Fidelity(steps=1), Fidelity(steps=2, window=2))}
    assert min(spent.values()) > 0
    assert engine.free_slots == 3


def test_sessions_come_out_the_same_with_and_without_it(tiny_world: Path) -> None:
    frames = []
    for warm in (False, True):
        engine = StreamingEngine(load_world(tiny_world, torch.float32), slots=1)
        if warm:
            warm_up(engine)
        (chunk,) = engine.advance([Turn(engine.open(seed=3), CameraVelocity(forward=1.0))])
        assert isinstance(chunk, Chunk)
        frames.append(chunk.frames)
    np.testing.assert_array_equal(*frames)


def test_what_the_engine_cannot_do_is_refused_and_leaves_all_slots_free(tiny_world: Path) -> None:
    engine = StreamingEngine(load_world(tiny_world, torch.float32), slots=2)
    with pytest.raises(ConfigError, match="sessions=3: expected from 1 to the free slots, 2"):
        warm_up(engine, (1, 3))
    with pytest.raises(SessionError, match="steps=3: expected one of"):
        warm_up(engine, (2,), (Fidelity(steps=3),))
    assert engine.free_slots == 2
