"""Sessions on top of the cached chunk rollout. Imports nothing of training."""

from minwm.models.worlds import World, load_world
from minwm.streaming.engine import Chunk, StreamingEngine, StreamSpec
from minwm.streaming.session import Fidelity, Session, Turn

__all__ = ["Chunk", "Fidelity", "Session", "StreamSpec", "StreamingEngine", "Turn", "World", "load_world"]
