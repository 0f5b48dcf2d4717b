"""Stage 1: bidirectional flow matching with camera control.

All frames of a clip share one noise level and see each other. In a share of the samples the first
latent frames, one up to half of them, are given clean: the model learns to go on from an image or a past.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.diffusion import flow
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.context import Full
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.draw import Draw
from minwm.training.levels import LevelsConfig


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig:
    """`given_share`: share of samples whose first latent frames are given clean."""

    window: WindowConfig = WindowConfig()
    given_share: float = 0.7
    levels: LevelsConfig = LevelsConfig()

    def __post_init__(self) -> None:
        if self.given_share > 0 and self.window.frames < 2:
            raise ConfigError(
                f"window.frames={self.window.frames}: expected at least 2 where given_share={self.given_share}"
            )


class Bidirectional:
    """Regress the velocity of whole clips."""

    def __init__(self, config: BidirectionalConfig, backbone: Backbone) -> None:
        self._config, self._backbone = config, backbone
        self.networks: Mapping[str, nn.Module] = {"generator": backbone.model}
        self.frozen: Mapping[str, nn.Module] = {}
        self.fixed: Mapping[str, nn.Module] = {}

    def turns(self, step: int) -> Sequence[str]:
        return ("generator",)

    def prepare(self, samples: Sequence[Clip], draw: Draw) -> Batch:
        return cut_windows(samples, draw, self._config.window, self._backbone.encode)

    def loss(self, turn: str, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        clean, shift, levels = batch.latents, self._backbone.config.shift, self._config.levels
        f = clean.shape[1]
        noise = draw.normal("noise", clean.shape[1:])
        given = (draw.integer("given", max(1, f // 2)) + 1) * (draw.uniform("has past") < self._config.given_share)
        noisy = torch.arange(f, device=clean.device) >= given[:, None]
        sigma = levels.draw(draw, shift) * noisy
        model = self._backbone.model
        predicted = model(
            flow.add_noise(clean, noise, sigma),
            sigma * flow.TIMESTEPS,
            model.prompt(batch.text, bidirectional=True),
            Full(f),
            batch.conditions,
        )
        error = (predicted.float() - flow.velocity(clean, noise)).square().mean((2, 3, 4))
        # a mean over the clips of means over their noisy frames: parts of a batch then average to the whole
        counted = noisy * levels.weight(sigma, shift) * error
        return (counted.sum(1) / noisy.sum(1)).mean(), {}

    def after_step(self, step: int) -> None:
        pass

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_backbone(folder, self._backbone, about)
