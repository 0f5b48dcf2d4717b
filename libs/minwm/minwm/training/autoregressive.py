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
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Context, teacher_forcing
from minwm.models.transformer import Prompt, Transformer
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Chunk, window and sink come from the backbone's configuration."""

    window: WindowConfig = WindowConfig()


class Autoregressive:
    """Regress the velocity of every chunk given clean history."""

    def __init__(self, config: AutoregressiveConfig, backbone: Backbone) -> None:
        backbone.config.history.require_chunks(config.window.frames)
        self._config, self._backbone = config, backbone
        self.networks: Mapping[str, nn.Module] = {"generator": backbone.model}
        self.frozen: Mapping[str, nn.Module] = {}

    def turns(self, step: int) -> Sequence[str]:
        return ("generator",)

    def prepare(self, samples: Sequence[Clip], draw: Draw) -> Batch:
        return cut_windows(samples, draw, self._config.window, self._backbone.encode)

    def loss(self, turn: str, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        model, config = self._backbone.model, self._backbone.config
        noise = draw.normal("noise", batch.latents.shape[1:])
        sigma = chunk_levels(draw, batch.latents.shape[1], config.history.chunk, config.shift)
        noisy = flow.add_noise(batch.latents, noise, sigma)
        context = teacher_forcing(batch.latents.shape[1], config.history)
        predicted = denoise_given_clean(
            model, noisy, batch.latents, sigma, model.prompt(batch.text), batch.conditions, context
        )
        return (predicted.float() - flow.velocity(batch.latents, noise)).square().mean(), {}

    def after_step(self, step: int) -> None:
        pass

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_backbone(folder, self._backbone, about)


def chunk_levels(draw: Draw, frames: int, chunk: int, shift: float) -> Tensor:
    """A noise level per chunk, (b, frames), for a whole number of chunks."""
    return flow.warp(draw.uniform("level", (frames // chunk,)), shift).repeat_interleave(chunk, 1)


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
