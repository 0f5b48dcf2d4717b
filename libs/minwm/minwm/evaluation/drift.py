"""Whether a long rollout still looks like the game: brightness, contrast and sharpness against real frames'.

Appearance is (t, 3), a row per frame: mean luma, its standard deviation, and the variance of its Laplacian, of luma in
0 to 1. A frame is in range when all three lie between the 1st and the 99th percentile of real frames.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minwm.evaluation.quality import luma

MEASURES = ("brightness", "contrast", "sharpness")
PERCENTILES = (1.0, 99.0)


@dataclass(frozen=True)
class RealRange:
    """The range of real data: bounds (3,), one for each of MEASURES."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, appearance: NDArray[np.float64]) -> "RealRange":
        """That of real frames' appearance (t, 3)."""
        low, high = np.percentile(appearance, PERCENTILES, axis=0)
        return cls(low, high)

    def inside(self, appearance: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which frames (t,) lie within all bounds."""
        return np.asarray(((appearance >= self.low) & (appearance <= self.high)).all(axis=-1))


def appearance(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Brightness, contrast and sharpness (t, 3) of frames (t, y, x, 3)."""
    light = luma(frames) / 255
    centre = light[:, 1:-1, 1:-1]
    around = light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
    return np.stack([light.mean((1, 2)), light.std((1, 2)), (around - 4 * centre).var((1, 2))], axis=1)


def per_second(values: NDArray[np.float64], fps: float) -> NDArray[np.float64]:
    """The means (s, …) of each second's rows of `values` (t, …); a last second that is not full counts as one."""
    seconds = (np.arange(len(values)) / fps).astype(int)
    return np.stack([values[seconds == second].mean(0) for second in range(seconds[-1] + 1)])
