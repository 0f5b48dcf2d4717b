"""A minute's walk, as in a session: does the world still follow its camera, and still look like the game?

A clip that lasts as long is followed along its own path, and what is seen of its true frames tells how well motion can
be seen. From a shorter one the camera goes on by scripted keys, through walls too, and there are no true frames beside
it. Directions are judged against what was commanded, and appearance against the range of real frames.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minwm.data.clips import Clip
from minwm.evaluation.controllability import direction_shares, walking_pace
from minwm.evaluation.drift import MEASURES, RealRange, appearance, per_second
from minwm.evaluation.judge import MotionEstimator, true_motions
from minwm.evaluation.pictures import keyed_video, side_by_side
from minwm.evaluation.rollouts import Comparison, stream
from minwm.evaluation.walks import Walk, along_clip, by_keys, script
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.worlds import World
from minwm.progress import Report

FIRST_SECONDS, LAST_SECONDS = 5.0, 10.0

_Motions = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Seen and commanded (n, 4), a row per latent frame."""


def measure(
    world: World,
    starts: Sequence[Clip],
    seconds: float,
    seed: int,
    seer: MotionEstimator | None,
    real: NDArray[np.float64],
    out: Path,
    report: Report,
) -> dict[str, Any]:
    """Walk for `seconds` from each clip's first chunk; `real` is the appearance (t, 3) of real frames.

    Writes a video of each walk to `out`. The result has `videos`, `scripted` (how many went by keys), `range`,
    `per_second` curves, `in_range` shares and, where motion is seen, `directions` in the first 5 s and the last 10 s,
    with the bounds of these `sections`; `true_directions` are seen in the true frames of the clips that have them.
    """
    card, chunk = world.card, world.backbone.config.history.chunk
    chunk_seconds = chunk * FRAMES_PER_LATENT / card.fps
    chunks = int(np.ceil(seconds / chunk_seconds - 1e-9))
    begins = np.arange(chunks) * chunk_seconds
    sections = {"first": (0.0, min(FIRST_SECONDS, seconds)), "last": (max(0.0, seconds - LAST_SECONDS), seconds)}
    spans: dict[str, tuple[int, int]] = {
        name: tuple(np.searchsorted(begins, (low - 1e-9, high - 1e-9)).tolist())
        for name, (low, high) in sections.items()
    }
    found: dict[str, list[_Motions]] = {name: [] for name in sections}
    true: dict[str, list[_Motions]] = {name: [] for name in sections}
    looks: list[NDArray[np.float64]] = []
    videos: list[dict[str, str]] = []
    scripted = 0
    for clip in starts:
        walk, keys = _course(world, clip, chunks, seed)
        video = clip.video()
        given, beyond = video[: chunk * FRAMES_PER_LATENT], video[chunk * FRAMES_PER_LATENT :]
        pieces = []
        for piece in stream(world, walk, seed=seed):
            pieces.append(piece)
            report(len(videos) * chunks + len(pieces))
        shown = np.concatenate(pieces)
        for name, span in spans.items():
            if seer is not None:
                found[name].append(follow(seer, _after(given, shown), walk.poses, chunk, *span))
            if seer is not None and keys is None:
                true[name].append(follow(seer, _after(given, beyond), walk.poses, chunk, *span))
        looks.append(appearance(shown[: round(seconds * card.fps)]))
        scripted += keys is not None
        name = f"{clip.name}-walk.mp4"
        if keys is None:
            beside = Comparison(clip=clip.name, given=given, true=beyond[: len(shown)], others={"generated": shown})
            (out / name).write_bytes(side_by_side(beside, ["generated"], card.fps))
        else:
            (out / name).write_bytes(keyed_video(shown, keys, card.fps))
        videos.append({"name": clip.name, "video": name})
    return {
        "clips": len(starts),
        "scripted": scripted,
        "seconds": seconds,
        "videos": videos,
        **_drift(looks, real, card.fps, round((seconds - sections["last"][0]) * card.fps)),
        "sections": sections,
        "directions": {name: _shares(world, pairs) for name, pairs in found.items() if pairs},
        "true_directions": {name: _shares(world, pairs) for name, pairs in true.items() if pairs},
    }


def _course(world: World, clip: Clip, chunks: int, seed: int) -> tuple[Walk, list[tuple[str, ...]] | None]:
    """From the first chunk `chunks` more along the clip's own path, where it lasts as long; else by keys, given too."""
    if len(clip.latents) >= (1 + chunks) * world.backbone.config.history.chunk:
        return along_clip(world, clip, chunks), None
    keys = script(chunks, seed, clip.name)
    return by_keys(world, clip, keys), keys


def _after(given: NDArray[np.uint8], frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames that begin with the last given latent frame's."""
    return np.concatenate([given[-FRAMES_PER_LATENT:], frames])


def follow(
    seer: MotionEstimator, frames: NDArray[np.uint8], poses: NDArray[np.float64], chunk: int, first: int, end: int
) -> _Motions:
    """What is seen and what was commanded in chunks [first, end) of a walk.

    `frames` (t, y, x, 3) begin with the last given latent frame's four, `poses` (f, 4, 4) with the first given one's.
    """
    span = frames[FRAMES_PER_LATENT * first * chunk : FRAMES_PER_LATENT * (1 + end * chunk)]
    told = true_motions(poses[chunk - 1 + first * chunk : chunk + end * chunk])
    return seer.motions(span), told


def _shares(world: World, pairs: Sequence[_Motions]) -> dict[str, Any]:
    seen, told = (np.concatenate(motions) for motions in zip(*pairs, strict=True))
    chunk = world.backbone.config.history.chunk
    shares = direction_shares(seen, told, chunk=chunk, pace=walking_pace(world.card))
    return {name: share.to_json() for name, share in shares.items()}


def _drift(looks: Sequence[NDArray[np.float64]], real: NDArray[np.float64], fps: float, last: int) -> dict[str, Any]:
    """The walks' appearance (t, 3) against real frames'; the `last` frames also by themselves."""
    bounds = RealRange.of(real)
    inside = np.stack([bounds.inside(look) for look in looks])
    curves = per_second(np.mean(looks, axis=0), fps)
    return {
        "range": {
            name: [float(low), float(high)] for name, low, high in zip(MEASURES, bounds.low, bounds.high, strict=True)
        },
        "per_second": {name: curve.tolist() for name, curve in zip(MEASURES, curves.T, strict=True)},
        "in_range_per_second": per_second(inside.mean(0), fps).tolist(),
        "in_range": {
            "all": float(inside.mean()),
            "last": float(inside[:, -last:].mean()),
            "real": float(bounds.inside(real).mean()),
        },
    }
