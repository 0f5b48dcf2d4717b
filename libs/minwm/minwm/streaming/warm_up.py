"""What the first chunks of an engine would wait for, done before anybody does: lazy libraries, compiling, capturing."""

import time
from collections.abc import Sequence
from itertools import product

from minwm.errors import ConfigError, SessionError
from minwm.geometry.live import CameraVelocity
from minwm.streaming.engine import StreamingEngine
from minwm.streaming.session import Session, Turn
from minwm.streaming.stream import Fidelity


def warm_up(
    engine: StreamingEngine, sessions: Sequence[int] = (1,), fidelities: Sequence[Fidelity] = (Fidelity(),)
) -> dict[tuple[int, Fidelity], float]:
    """Seconds that it took, for so many sessions in one batch and each fidelity.

    Sessions are opened, go on until their windows are full, and are closed. Raises ConfigError for more of them than
    free slots, SessionError for what the model does not offer.
    """
    if not 0 < max(sessions) <= engine.free_slots:
        raise ConfigError(f"sessions={max(sessions)}: expected from 1 to the free slots, {engine.free_slots}")
    history = engine.world.backbone.config.history
    quick = Fidelity(steps=min(engine.world.backbone.config.levels))
    filling = [quick] * -(-(history.sink + history.window) // history.chunk)
    spent = {}
    for count, fidelity in product(sessions, fidelities):
        started = time.perf_counter()
        opened = [engine.open(seed=number) for number in range(count)]
        try:
            for each in (fidelity, *filling, fidelity):
                _go_on(engine, opened, each)
        finally:
            for session in opened:
                engine.close(session)
        spent[count, fidelity] = time.perf_counter() - started
    return spent


def _go_on(engine: StreamingEngine, sessions: Sequence[Session], fidelity: Fidelity) -> None:
    for result in engine.advance([Turn(session, CameraVelocity(), fidelity) for session in sessions]):
        if isinstance(result, SessionError):
            raise result
    engine.settle(sessions)
