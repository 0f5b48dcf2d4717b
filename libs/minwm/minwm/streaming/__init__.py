"""Sessions on top of the cached chunk rollout. Imports nothing of training."""

from minwm.models.worlds import World, load_world
from minwm.streaming.engine import StreamingEngine
from minwm.streaming.scheduler import DeadlineScheduler, Ready
from minwm.streaming.session import Session, Turn
from minwm.streaming.stream import Chunk, Fidelity, StreamSpec
from minwm.streaming.warm_up import warm_up

__all__ = [
    "Chunk",
    "DeadlineScheduler",
    "Fidelity",
    "Ready",
    "Session",
    "StreamSpec",
    "StreamingEngine",
    "Turn",
    "World",
    "load_world",
    "warm_up",
]
