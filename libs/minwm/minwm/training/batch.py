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
from minwm.geometry.camera import crop_intrinsics, invert, relative_viewmats
from minwm.models.backbones import Encode
from minwm.models.conditions import Conditions, first_image
from minwm.models.prope import Cameras
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows are cut from clips.

    crop: sides (y, x) in latents of the random piece of the picture that a sample is, seen through that piece's
        own intrinsics; None: the whole
    prompt_dropout, image_dropout: shares of samples trained without their caption, or first image
    """

    frames: int = 8
    crop: tuple[int, int] | None = None
    prompt_dropout: float = 0.1
    image_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.crop is not None and min(self.crop) < 1:
            raise ConfigError(f"window.crop={self.crop}: expected positive sides")
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
    latents, cameras, lenses, actions, captions = [], [], [], [], []
    drawn = zip(draw.uniform("window"), draw.uniform("crop", (2,)), draw.uniform("prompt"), strict=True)
    for clip, (place, corner, dropped) in zip(clips, drawn, strict=True):
        room = len(clip.latents) - config.frames
        if room < 0:
            raise DataError(f"clip {clip.name}: has {len(clip.latents)} latent frames, windows need {config.frames}")
        start = int(place * (room + 1))
        window = slice(start, start + config.frames)
        piece, intrinsics = _crop(clip, window, config.crop, corner)
        latents.append(torch.from_numpy(piece).float())
        lenses.append(torch.from_numpy(intrinsics))
        cameras.append((relative_viewmats(clip.poses[window]), _viewmat_before(clip, start)))
        actions.append(torch.from_numpy(clip.actions[window]))
        captions.append("" if dropped < config.prompt_dropout else clip.caption)
    viewmats, before = (torch.from_numpy(np.stack(part)) for part in zip(*cameras, strict=True))
    stacked = torch.stack(latents)
    shown = (draw.uniform("image") >= config.image_dropout)[:, None, None, None]
    conditions = Conditions(
        cameras=Cameras.track(viewmats, torch.stack(lenses), before),
        actions=torch.stack(actions),
        image=first_image(stacked[:, 0]) * shown,
    )
    return Batch(stacked, conditions, encode(captions))


def _crop(
    clip: Clip, window: slice, crop: tuple[int, int] | None, corner: Tensor
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """The window's latents (f, c, y, x) and intrinsics (4,), of the piece whose place is `corner` (2,) in [0, 1)."""
    latents = clip.latents[window]
    if crop is None:
        return latents, clip.intrinsics
    rows, columns = latents.shape[-2:]
    if crop[0] > rows or crop[1] > columns:
        raise DataError(f"clip {clip.name}: latents are {rows}x{columns}, too small for window.crop={crop}")
    top, left = (
        int(place * (space + 1)) for place, space in zip(corner, (rows - crop[0], columns - crop[1]), strict=True)
    )
    piece = latents[..., top : top + crop[0], left : left + crop[1]]
    return piece, crop_intrinsics(clip.intrinsics, (rows, columns), (top, left), crop)


def _viewmat_before(clip: Clip, start: int) -> NDArray[np.float32]:
    """The viewmat (4, 4), in the world of frame `start`, of the frame before it; a clip's first frame is at rest."""
    return np.asarray(invert(clip.poses[max(start - 1, 0)]) @ clip.poses[start], np.float32)
