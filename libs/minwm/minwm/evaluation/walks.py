"""Where an evaluated rollout begins and where its camera goes: along a held-out clip's true path, or by a script.

A walk is a first chunk of true latents and the camera poses of every latent frame. Scripted walks hold the keys of live
control at the world's own speeds, for as long as asked; there are no true frames beside them, only the commands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from minwm.data.clips import Clip
from minwm.errors import DataError
from minwm.geometry.actions import from_poses
from minwm.geometry.live import advance, velocity_from_keys
from minwm.models.autoencoder import PIXELS_PER_LATENT
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.worlds import World
from minwm.randomness import generator

HELD_CHUNKS = 4  # that a script holds its keys for: 1.8 s of the wan-doom preset
SCRIPT = (("w",), ("l",), ("w", "l"), ("a",), ("j",), ("s",), ("w", "j"), ("d",))


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What a rollout is given.

    given:      (chunk, c, y, x) float16, true latents of the first chunk
    poses:      (f, 4, 4) float64, camera to world, of all latent frames, the given ones included
    actions:    (f,) int64, 81 classes
    intrinsics: (4,) float32
    """

    name: str
    caption: str
    given: NDArray[np.float16]
    poses: NDArray[np.float64]
    actions: NDArray[np.int64]
    intrinsics: NDArray[np.float32]


def along_clip(world: World, clip: Clip, chunks: int) -> Walk:
    """The clip's first chunk, and its true path for `chunks` more.

    Raises DataError for a clip that is too short, or of another size than the world's.
    """
    chunk = world.backbone.config.history.chunk
    frames = (1 + chunks) * chunk
    require_fit(world, clip, frames)
    return Walk(
        name=clip.name,
        caption=clip.caption,
        given=clip.latents[:chunk],
        poses=clip.poses[:frames],
        actions=clip.actions[:frames],
        intrinsics=clip.intrinsics,
    )


def by_keys(world: World, clip: Clip, keys: Sequence[Sequence[str]]) -> Walk:
    """The clip's first chunk, then one chunk for each group of keys held. Raises as `along_clip` does."""
    chunk, card = world.backbone.config.history.chunk, world.card
    require_fit(world, clip, chunk)
    poses = list(clip.poses[:chunk])
    for held in keys:
        velocity = velocity_from_keys(held, card.speeds)
        for _ in range(chunk):
            poses.append(advance(poses[-1], velocity, FRAMES_PER_LATENT / card.fps))
    path = np.stack(poses)
    return Walk(
        name=clip.name,
        caption=clip.caption,
        given=clip.latents[:chunk],
        poses=path,
        actions=from_poses(path),
        intrinsics=clip.intrinsics,
    )


def script(chunks: int, *key: int | str) -> list[tuple[str, ...]]:
    """The keys held in each of `chunks` chunks: every entry of SCRIPT in turn, in an order that `key` shuffles anew."""
    held: list[tuple[str, ...]] = []
    cycle = 0
    while len(held) < chunks:
        order = torch.randperm(len(SCRIPT), generator=generator(*key, cycle)).tolist()
        held += [SCRIPT[place] for place in order for _ in range(HELD_CHUNKS)]
        cycle += 1
    return held[:chunks]


def require_fit(world: World, clip: Clip, frames: int) -> None:
    """Raise DataError unless the clip has the world's latent size and at least `frames` latent frames."""
    card, channels = world.card, world.backbone.config.architecture.channels
    expected = (channels, card.height // PIXELS_PER_LATENT, card.width // PIXELS_PER_LATENT)
    if clip.latents.shape[1:] != expected:
        raise DataError(f"clip {clip.name}: latents are {clip.latents.shape[1:]}, {card.name} expects {expected}")
    if len(clip.latents) < frames:
        raise DataError(f"clip {clip.name}: has {len(clip.latents)} latent frames, the rollout needs {frames}")
