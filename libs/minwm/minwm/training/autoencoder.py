"""Stage 0: the tiny streaming autoencoder, on the game's own frames.

Loss: absolute error, plus the absolute error of the picture's gradients (keeps edges that a plain
mean would blur), plus a light pull of the latents towards unit size so that they stay bounded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.data.episode import Episode
from minwm.errors import ConfigError, DataError
from minwm.models.autoencoder import PIXELS_PER_LATENT, Autoencoder, AutoencoderConfig
from minwm.models.checkpoints import load_autoencoder, save_autoencoder
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.training.draw import Draw

MOMENTS_WEIGHT = 0.02  # of a batch: the statistics are those of about the last fifty


@dataclass(frozen=True, kw_only=True)
class AutoencoderStageConfig:
    """`latent_frames` per sample; the first one's loss counts like the others'.

    start: folder of an autoencoder to go on from, whose architecture then replaces `model`
    crop:  sides (y, x) in pixels of the random piece of the picture that a sample is; None: the whole
    latent_noise: deviation of the noise on the latents that are decoded, so that a generator's small errors do little
    """

    model: AutoencoderConfig = AutoencoderConfig()
    start: Path | None = None
    latent_frames: int = 3
    crop: tuple[int, int] | None = None
    edge_weight: float = 1.0
    latent_weight: float = 1e-4
    latent_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.crop is not None and (min(self.crop) < 1 or any(side % PIXELS_PER_LATENT for side in self.crop)):
            raise ConfigError(f"crop={self.crop}: expected positive multiples of {PIXELS_PER_LATENT}")


class _Moments(nn.Module):
    """Slow averages of the latents' mean and mean square per channel; plain ones while batches are few."""

    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))

    @torch.no_grad()
    def update(self, latents: Tensor, weight: float) -> None:
        """Take in latents (b, f, c, y, x)."""
        self.count += 1
        weight = max(weight, 1 / float(self.count))
        dims = (0, 1, 3, 4)
        self.mean.lerp_(latents.mean(dims), weight)
        self.square.lerp_(latents.square().mean(dims), weight)


class AutoencoderStage:
    """Trains encoder and decoder together; calibrates the latents' statistics on export."""

    def __init__(self, config: AutoencoderStageConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self._config = config
        model = Autoencoder(config.model) if config.start is None else load_autoencoder(config.start)
        self.model = model.train().requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: Mapping[str, nn.Module] = {"autoencoder": self.model}
        self._moments = _Moments(model.config.latent_channels)
        self.frozen: Mapping[str, nn.Module] = {"moments": self._moments}
        self.fixed: Mapping[str, nn.Module] = {}

    def turns(self, step: int) -> Sequence[str]:
        return ("autoencoder",)

    def prepare(self, samples: Sequence[Episode], draw: Draw) -> Tensor:
        """Windows (b, 4f, 3, y, x) in [0, 1], half of them mirrored. Raises DataError for a too large crop."""
        length = self._config.latent_frames * FRAMES_PER_LATENT
        windows = []
        places = zip(draw.uniform("start"), draw.uniform("crop", (2,)), draw.uniform("mirror"), strict=True)
        for episode, (start, corner, mirror) in zip(samples, places, strict=True):
            first = int(start * (len(episode.frames) - length + 1))
            window = self._cropped(torch.from_numpy(episode.frames[first : first + length]), corner)
            windows.append(window.flip(2) if mirror < 0.5 else window)
        return torch.stack(windows).permute(0, 1, 4, 2, 3).float() / 255

    def _cropped(self, frames: Tensor, corner: Tensor) -> Tensor:
        """The piece of frames (t, y, x, 3) whose place is `corner` (2,) in [0, 1)."""
        if self._config.crop is None:
            return frames
        height, width = self._config.crop
        room = (frames.shape[1] - height, frames.shape[2] - width)
        if min(room) < 0:
            raise DataError(f"crop={height}x{width}: frames are only {frames.shape[1]}x{frames.shape[2]}")
        top, left = (int(place * (space + 1)) for place, space in zip(corner, room, strict=True))
        return frames[:, top : top + height, left : left + width]

    def loss(self, turn: str, batch: Tensor, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        latents, _ = self.model.encode(batch)
        noise = draw.normal("latent noise", latents.shape[1:])
        frames, _ = self.model.decode(latents + self._config.latent_noise * noise)
        if torch.is_grad_enabled():  # not where a held-out loss is asked for
            self._moments.update(latents.float(), MOMENTS_WEIGHT)
        loss, psnr = reconstruction_loss(frames.float() - batch, self._config.edge_weight)
        size = latents.float().square().mean()
        return loss + self._config.latent_weight * size, {"psnr": psnr, "latent_rms": float(size.detach().sqrt())}

    def after_step(self, step: int) -> None:
        pass

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        deviation = (self._moments.square - self._moments.mean.square()).sqrt()
        self.model.calibrate(self._moments.mean, deviation)
        save_autoencoder(folder, self.model, about)


def reconstruction_loss(error: Tensor, edge_weight: float) -> tuple[Tensor, float]:
    """The loss of frames that are off by `error` (…, 3, y, x), size of latents aside, and their PSNR in dB."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edge_weight * edges, float(-10 * error.detach().square().mean().log10())
