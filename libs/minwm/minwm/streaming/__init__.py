"""Sessions on top of the cached chunk rollout. Imports nothing of training."""

from minwm.models.worlds import World, load_world
from minwm.streaming.engine import Chunk, Session, StreamingEngine, StreamSpec

__all__ = ["Chunk", "Session", "StreamSpec", "StreamingEngine", "World", "load_world"]
