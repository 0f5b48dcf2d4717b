"""What is measured of one clip's frames, and clips' measures put together into tables.

Every source of frames (generated, a baseline, a teacher, the true ones themselves) goes through the same `measure`.
Critics see what arithmetic on pixels does not; without one, what it would say is None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minwm.evaluation.judge import FeatureExtractor, MotionEstimator
from minwm.evaluation.quality import frechet, psnr, ssim
from minwm.models.layout import FRAMES_PER_LATENT

HORIZONS = (0.5, 1.0, 2.0, 4.0)  # seconds after the last given frame
CURVES = ("psnr", "ssim", "perceptual")
FRECHET_SECONDS = 4.0
LEAST_CLIP = 8  # frames that a FeatureExtractor needs


@dataclass(frozen=True, kw_only=True)
class Critics:
    """Who sees motion, and in whose features videos are compared; `name` tells one pair from another."""

    name: str = ""
    motion: MotionEstimator | None = None
    features: FeatureExtractor | None = None


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one source's frames on one clip, from the first frame after the given ones on.

    psnr, ssim, perceptual: (t,) against the true frames
    features: (d,) of the first four seconds
    motions:  (n, 4) between latent frames, the first one from the last given
    """

    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]
    perceptual: NDArray[np.float64] | None = None
    features: NDArray[np.float64] | None = None
    motions: NDArray[np.float64] | None = None


def measure(
    frames: NDArray[np.uint8], true: NDArray[np.uint8], given: NDArray[np.uint8], critics: Critics, fps: float
) -> Measures:
    """Measure frames (t, y, x, 3) that follow `given`, as many as the `true` ones."""
    clip = frames[: round(FRECHET_SECONDS * fps)]
    seer, extractor = critics.motion, critics.features
    return Measures(
        psnr=psnr(frames, true),
        ssim=ssim(frames, true),
        perceptual=None if extractor is None else extractor.perceptual(frames, true),
        features=None if extractor is None or len(clip) < LEAST_CLIP else extractor.clip_features(clip),
        motions=None if seer is None else seer.motions(np.concatenate([given[-FRAMES_PER_LATENT:], frames])),
    )


def curve_tables(sources: Mapping[str, Sequence[Measures]], fps: float) -> dict[str, Any]:
    """Means over the clips, for each of CURVES that was measured.

    `per_frame` curves by source, and `at` each of HORIZONS that the rollouts reach: "at 0.5 s" is the frame shown
    0.5 s after the last given one.
    """
    tables = {}
    for name in CURVES:
        rows = {source: [getattr(one, name) for one in measured] for source, measured in sources.items()}
        if any(row is None for measured in rows.values() for row in measured):
            continue
        curves = {source: np.mean(measured, axis=0) for source, measured in rows.items()}
        places = {seconds: round(seconds * fps) - 1 for seconds in HORIZONS}
        length = min(len(curve) for curve in curves.values())
        tables[name] = {
            "per_frame": {source: curve.tolist() for source, curve in curves.items()},
            "at": [
                {"seconds": seconds, **{source: float(curve[place]) for source, curve in curves.items()}}
                for seconds, place in places.items()
                if 0 <= place < length
            ],
        }
    return tables


def frechet_table(
    sources: Mapping[str, Sequence[Measures]], real: Sequence[Measures], frames: int, fps: float
) -> dict[str, Any]:
    """Each source's Fréchet distance to the true frames of the same clips; empty without features.

    `clips` and the `seconds` of each say what it rests on; the estimator is `quality.frechet`'s.
    """
    vectors = {
        source: [one.features for one in measured if one.features is not None]
        for source, measured in {**sources, "real": real}.items()
    }
    if any(len(found) < len(real) for found in vectors.values()):
        return {}
    true = np.stack(vectors.pop("real"))
    distances = {source: frechet(np.stack(found), true) for source, found in vectors.items()}
    return {"clips": len(real), "seconds": min(frames / fps, FRECHET_SECONDS), **distances}
