"""What a stream is to those outside: its description, how a chunk of it is asked for, and what comes out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minwm.errors import ConfigError
from minwm.geometry.live import Speeds


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What a client has to know of the stream."""

    model: str
    height: int
    width: int
    fps: float
    frames_per_chunk: int
    speeds: Speeds
    start_images: tuple[str, ...]

    @property
    def chunk_seconds(self) -> float:
        """Playing time of one chunk."""
        return self.frames_per_chunk / self.fps


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """frames (t, y, x, 3) uint8, and how long making them took: the whole batch's time, where there was one."""

    index: int
    frames: NDArray[np.uint8]
    denoise_seconds: float
    decode_seconds: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How a chunk is made; it may change from chunk to chunk.

    steps:  of denoising, one of the numbers that the model was trained for
    window: latent frames attended to, the chunk's included
    euler:  straight steps along the ODE instead of predicting and noising again
    Both numbers are the model's own if not given.
    """

    steps: int | None = None
    window: int | None = None
    euler: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"fidelity.{name}={value}: expected at least 1")
