"""Stage 2: autoregressive, by teacher forcing.

Each chunk has its own noise level and is denoised given the clean chunks before it, all chunks of a
clip in one pass under the teacher-forcing mask (Causal Forcing, arXiv 2602.02214).
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
from minwm.models.conditions import Conditions
from minwm.models.context import Context, teacher_forcing
from minwm.models.transformer import Prompt, Transformer
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.draw import Draw
from minwm.training.levels import LevelsConfig, chunk_levels


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Chunk, window and sink come from the backbone's configuration.

    context_noise: highest level of the noise in the history, of which the model is not told; 0: a true history
    """

    window: WindowConfig = WindowConfig()
    levels: LevelsConfig = LevelsConfig()
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.context_noise < 1:
            raise ConfigError(f"context_noise={self.context_noise}: expected a level from 0 to below 1")


class Autoregressive:
    """Regress the velocity of every chunk given clean history."""

    def __init__(self, config: AutoregressiveConfig, backbone: Backbone) -> None:
        backbone.config.history.require_chunks(config.window.frames)
        self._config, self._backbone = config, backbone
        self.networks: Mapping[str, nn.Module] = {"generator": backbone.model}
        self.frozen: Mapping[str, nn.Module] = {}
        self.fixed: Mapping[str, nn.Module] = {}

    def turns(self, step: int) -> Sequence[str]:
        return ("generator",)

    def prepare(self, samples: Sequence[Clip], draw: Draw) -> Batch:
        return cut_windows(samples, draw, self._config.window, self._backbone.encode)

    def loss(self, turn: str, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        clean, model, config = batch.latents, self._backbone.model, self._backbone.config
        frames, chunk = clean.shape[1], config.history.chunk
        noise = draw.normal("noise", clean.shape[1:])
        sigma = chunk_levels(draw, frames, chunk, config.shift, self._config.levels)
        history = ContextNoise.drawn(draw, "context", clean.shape[1:], chunk, self._config.context_noise)
        predicted = denoise_given_clean(
            model,
            flow.add_noise(clean, noise, sigma),
            history.onto(clean),
            sigma,
            model.prompt(batch.text),
            batch.conditions,
            teacher_forcing(frames, config.history),
        )
        error = (predicted.float() - flow.velocity(clean, noise)).square().mean((2, 3, 4))
        return (self._config.levels.weight(sigma, config.shift) * error).mean(), {}

    def after_step(self, step: int) -> None:
        pass

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_backbone(folder, self._backbone, about)


@dataclass(frozen=True)
class ContextNoise:
    """Noise on the history that the model is not told of: levels (b, f), one per chunk, and noise (b, f, c, y, x).

    A session commits what it generated as clean, at timestep 0, and it never quite is: a model that has learnt to
    forgive a little drifts less (cf. GameNGen, arXiv 2408.14837, which tells the model the level instead).
    """

    level: Tensor
    noise: Tensor

    @classmethod
    def drawn(cls, draw: Draw, purpose: str, shape: Sequence[int], chunk: int, highest: float) -> "ContextNoise":
        """For latents (f, c, y, x): levels uniform in [0, `highest`]."""
        level = highest * draw.uniform(f"{purpose} level", (shape[0] // chunk,)).repeat_interleave(chunk, 1)
        return cls(level, draw.normal(purpose, shape))

    def onto(self, clean: Tensor, start: int = 0) -> Tensor:
        """Clean frames (b, n, c, y, x), `start` being the first one's index, with their noise."""
        frames = slice(start, start + clean.shape[1])
        return flow.add_noise(clean, self.noise[:, frames], self.level[:, frames])


def denoise_given_clean(
    model: Transformer,
    noisy: Tensor,
    clean: Tensor,
    sigma: Tensor,
    prompt: Prompt,
    conditions: Conditions,
    context: Context,
) -> Tensor:
    """Velocity (b, f, c, y, x) of noisy frames at levels (b, f), each chunk given the clean ones before it."""
    both = model(
        torch.cat([clean, noisy], dim=1),
        torch.cat([torch.zeros_like(sigma), sigma], dim=1) * flow.TIMESTEPS,
        prompt,
        context,
        conditions.repeat_frames(2),
    )
    return both[:, clean.shape[1] :]  # type: ignore[no-any-return]
