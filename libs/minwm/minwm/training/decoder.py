"""The tiny decoder of a big autoencoder's latents: what it reproduces are the true frames.

The latents come from the dataset, the big autoencoder isn't needed. A window cut from the middle of a stream
lacks the decoder's memory of what came before, so the loss leaves its first latent frames out: what counts is
decoded as it will be in a stream. A window from the beginning of a stream has no past to lack, and counts whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.data.video import decode_video
from minwm.errors import ConfigError, DataError
from minwm.models.autoencoder import DecoderConfig, TinyDecoder
from minwm.models.checkpoints import save_decoder
from minwm.models.layout import FRAMES_PER_LATENT, LatentLayout
from minwm.training.autoencoder import reconstruction_loss
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class DecoderStageConfig:
    """`latent_frames` per sample, of which the first `warm` don't count: as many as the default blocks remember.

    Without a leading layout a clip doesn't tell the beginning of a stream; `warm: 0` trains for that too.
    """

    model: DecoderConfig
    latent_frames: int = 8
    warm: int = 4
    edge_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.warm < self.latent_frames:
            raise ConfigError(f"warm={self.warm}: expected 0 to {self.latent_frames - 1}, fewer than latent_frames")


@dataclass(frozen=True)
class DecoderBatch:
    """latents (b, f, c, y, x), the frames (b, t, 3, y, x) in [0, 1] that decode returns, and which count (b, t)."""

    latents: Tensor
    frames: Tensor
    counted: Tensor


class DecoderStage:
    """Trains a decoder from random weights."""

    def __init__(self, config: DecoderStageConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self._config = config
        self.model = TinyDecoder(config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: Mapping[str, nn.Module] = {"decoder": self.model}
        self.frozen: Mapping[str, nn.Module] = {}
        self.fixed: Mapping[str, nn.Module] = {}

    def turns(self, step: int) -> Sequence[str]:
        return ("decoder",)

    def prepare(self, samples: Sequence[Clip], draw: Draw) -> DecoderBatch:
        """A random window of each clip. Not mirrored: mirrored latents are not a mirrored picture's."""
        size, layout = self._config.latent_frames, self._config.model.layout
        returned, steady = layout.rgb_frames(size), FRAMES_PER_LATENT * (size - self._config.warm)
        latents, pictures, counts = [], [], []
        for clip, place in zip(samples, draw.uniform("window"), strict=True):
            frames = _true_frames(clip, layout)
            room = len(clip.latents) - size
            if room < 0:
                raise DataError(f"clip {clip.name}: has {len(clip.latents)} latent frames, windows need {size}")
            start = int(place * (room + 1))
            missing = FRAMES_PER_LATENT * len(clip.latents) - len(frames)  # where the clip begins its stream
            end = FRAMES_PER_LATENT * (start + size) - missing
            latents.append(torch.from_numpy(clip.latents[start : start + size]).float())
            pictures.append(torch.from_numpy(frames[end - returned : end]))
            counts.append(returned if missing and start == 0 else steady)
        counted = torch.arange(returned) >= returned - torch.tensor(counts)[:, None]
        return DecoderBatch(torch.stack(latents), torch.stack(pictures).permute(0, 1, 4, 2, 3).float() / 255, counted)

    def loss(self, turn: str, batch: DecoderBatch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        frames, _ = self.model.decode(batch.latents)
        error = frames.float() - batch.frames
        loss, psnr = reconstruction_loss(error[batch.counted], self._config.edge_weight)
        return loss, {"psnr": psnr}

    def after_step(self, step: int) -> None:
        pass

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_decoder(folder, self.model, about)


def _true_frames(clip: Clip, layout: LatentLayout) -> NDArray[np.uint8]:
    """All frames of a clip: four a latent frame, or one for its first where it begins a stream of a leading layout.

    Raises DataError when they don't fit the latents, or the latents the layout.
    """
    f, c, y, x = clip.latents.shape
    if c != layout.channels:
        raise DataError(f"clip {clip.name}: latents have {c} channels, expected {layout.channels}")
    frames = decode_video(clip.frames, where=f"clip {clip.name}")
    fitting = sorted({FRAMES_PER_LATENT * f, layout.rgb_frames(f)}, reverse=True)
    if len(frames) not in fitting:
        raise DataError(
            f"clip {clip.name}: has {len(frames)} frames, expected {' or '.join(map(str, fitting))} "
            f"for {f} latent frames"
        )
    if frames.shape[1:3] != (layout.pixels * y, layout.pixels * x):
        raise DataError(
            f"clip {clip.name}: frames are {frames.shape[1]}x{frames.shape[2]}, expected "
            f"{layout.pixels * y}x{layout.pixels * x}: latents are {y}x{x}, {layout.pixels} pixels each"
        )
    return frames
