"""Clips to batches: what the four backbone stages have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minwm.data.clips import Clip
from minwm.errors import ConfigError, DataError
from minwm.geometry.camera import invert, relative_viewmats
from minwm.models.backbones import Encode
from minwm.models.conditions import Conditions, first_image
from minwm.models.prope import Cameras
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows are cut from clips. The dropouts: shares of samples trained without their caption, or first image."""

    frames: int = 8
    prompt_dropout: float = 0.1
    image_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.frames < 1 or not (0 <= self.prompt_dropout <= 1 and 0 <= self.image_dropout <= 1):
            raise ConfigError(
                f"window: frames={self.frames}, prompt_dropout={self.prompt_dropout}, "
                f"image_dropout={self.image_dropout}: expected at least one frame, and shares of 0 to 1"
            )


@dataclass(frozen=True)
class Batch:
    """latents (b, f, c, y, x) float32, what steers the same frames, text as the backbone's `prompt` takes it."""

    latents: Tensor
    conditions: Conditions
    text: Any


def cut_windows(clips: Sequence[Clip], draw: Draw, config: WindowConfig, encode: Encode) -> Batch:
    """A random window of `config.frames` latent frames from each clip; cameras relative to its first frame.

    The first frame's motion and action are those from the frame before the window.
    """
    latents, cameras, actions, captions = [], [], [], []
    for clip, place, dropped in zip(clips, draw.uniform("window"), draw.uniform("prompt"), strict=True):
        room = len(clip.latents) - config.frames
        if room < 0:
            raise DataError(f"clip {clip.name}: has {len(clip.latents)} latent frames, windows need {config.frames}")
        start = int(place * (room + 1))
        window = slice(start, start + config.frames)
        latents.append(torch.from_numpy(clip.latents[window]).float())
        cameras.append((relative_viewmats(clip.poses[window]), _viewmat_before(clip, start)))
        actions.append(torch.from_numpy(clip.actions[window]))
        captions.append("" if dropped < config.prompt_dropout else clip.caption)
    viewmats, before = (torch.from_numpy(np.stack(part)) for part in zip(*cameras, strict=True))
    intrinsics = torch.stack([torch.from_numpy(clip.intrinsics) for clip in clips])
    stacked = torch.stack(latents)
    shown = (draw.uniform("image") >= config.image_dropout)[:, None, None, None]
    conditions = Conditions(
        cameras=Cameras.track(viewmats, intrinsics, before),
        actions=torch.stack(actions),
        image=first_image(stacked[:, 0]) * shown,
    )
    return Batch(stacked, conditions, encode(captions))


def _viewmat_before(clip: Clip, start: int) -> NDArray[np.float32]:
    """The viewmat (4, 4), in the world of frame `start`, of the frame before it; a clip's first frame is at rest."""
    return np.asarray(invert(clip.poses[max(start - 1, 0)]) @ clip.poses[start], np.float32)
