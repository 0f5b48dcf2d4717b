"""Clips to batches: what the four backbone stages have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minwm.data.clips import Clip
from minwm.errors import DataError
from minwm.geometry.camera import relative_viewmats
from minwm.models.prope import Cameras
from minwm.models.text import byte_tokens
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows are cut from clips. `prompt_dropout`: share of samples trained without their caption."""

    frames: int = 8
    prompt_dropout: float = 0.1


@dataclass(frozen=True)
class Batch:
    """latents (b, f, c, y, x) float32, cameras of the same frames, text (b, l) bytes."""

    latents: Tensor
    cameras: Cameras
    text: Tensor


def cut_windows(clips: Sequence[Clip], draw: Draw, config: WindowConfig, text_length: int) -> Batch:
    """A random window of `config.frames` latent frames from each clip; cameras relative to its first frame."""
    latents, viewmats, captions = [], [], []
    for clip, place, dropped in zip(clips, draw.uniform("window"), draw.uniform("prompt"), strict=True):
        room = len(clip.latents) - config.frames
        if room < 0:
            raise DataError(f"clip {clip.name}: has {len(clip.latents)} latent frames, windows need {config.frames}")
        start = int(place * (room + 1))
        window = slice(start, start + config.frames)
        latents.append(torch.from_numpy(clip.latents[window]).float())
        viewmats.append(torch.from_numpy(relative_viewmats(clip.poses[window])))
        captions.append("" if dropped < config.prompt_dropout else clip.caption)
    intrinsics = torch.stack([torch.from_numpy(clip.intrinsics) for clip in clips])
    return Batch(torch.stack(latents), Cameras(torch.stack(viewmats), intrinsics), byte_tokens(captions, text_length))
