"""Stage 4: asymmetric distribution matching distillation with self-rollout.

The causal student generates clips from its own cache, exactly as it is served; two bidirectional
scores, one of the data (frozen) and one of the student (the critic, trained along), say which way its
samples should move (DMD, arXiv 2311.18828; Self Forcing, arXiv 2506.08009). The scores are asked at the
timestep of the noise that was really added.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.diffusion import flow
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, new_model, save_backbone
from minwm.models.context import Full
from minwm.models.rollout import ChunkRollout
from minwm.models.transformer import Transformer
from minwm.training.average import Average
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class DMDConfig:
    """steps: sampling steps of the student. critic_ratio: critic updates per generator update.

    context_chunks: true chunks the rollout starts from (0: from nothing).
    min_level, max_level: range of the noise at which the scores are compared.
    """

    window: WindowConfig = WindowConfig()
    score: Path
    steps: int = 4
    critic_ratio: int = 5
    guidance: float = 1.0
    context_chunks: int = 1
    min_level: float = 0.02
    max_level: float = 0.98
    ema_decay: float = 0.95


class DMD:
    """Match the distribution of self-generated clips to the data's."""

    def __init__(self, config: DMDConfig, backbone: Backbone, score: Backbone) -> None:
        backbone.config.history.require_chunks(config.window.frames)
        given = config.context_chunks * backbone.config.history.chunk
        if given >= config.window.frames:
            raise ConfigError(
                f"context_chunks={config.context_chunks}: gives {given} frames, "
                f"expected fewer than window.frames={config.window.frames}, so that some are generated"
            )
        self._config, self._backbone, self._given = config, backbone, given
        self._real = score.model.requires_grad_(False)
        self._critic = copy.deepcopy(score.model).requires_grad_(True)
        self._average = Average(backbone.model)
        self._levels = backbone.config.sampling_levels(config.steps)
        self.networks: Mapping[str, nn.Module] = {"generator": backbone.model, "critic": self._critic}
        self.frozen: Mapping[str, nn.Module] = {"average": self._average}

    def turns(self, step: int) -> Sequence[str]:
        return ("generator", "critic") if step % self._config.critic_ratio == 0 else ("critic",)

    def prepare(self, samples: Sequence[Clip], draw: Draw) -> Batch:
        return cut_windows(samples, draw, self._config.window, self._backbone.encode)

    def loss(self, turn: str, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        if turn == "generator":
            return self._generator_loss(batch, draw)
        return self._critic_loss(batch, draw)

    def _generator_loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        sample, made = self._roll_out(batch, draw, "generator")
        sigma = self._score_levels(draw, "generator", sample)
        noise = draw.normal("generator score noise", sample.shape[1:])
        with torch.no_grad():
            noisy = flow.add_noise(sample, noise, sigma)
            fake = self._predict_clean(self._critic, noisy, sigma, batch)
            real = self._guided_real(noisy, sigma, batch)
            scale = (sample - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
            gradient = ((fake - real) / scale)[:, made:]
        moved = (sample[:, made:] - gradient).detach()
        loss = 0.5 * (sample[:, made:] - moved).square().mean()
        return loss, {"dmd_gradient": float(gradient.abs().mean())}

    def _critic_loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            sample, _ = self._roll_out(batch, draw, "critic")
        sigma = self._score_levels(draw, "critic", sample)
        noise = draw.normal("critic score noise", sample.shape[1:])
        predicted = self._velocity(self._critic, flow.add_noise(sample, noise, sigma), sigma, batch, batch.text)
        return (predicted.float() - flow.velocity(sample, noise)).square().mean(), {}

    def _roll_out(self, batch: Batch, draw: Draw, turn: str) -> tuple[Tensor, int]:
        """The student's clip (b, f, c, y, x), and how many of its first frames were given.

        One exit step is drawn for all chunks of the step; only it carries gradient.
        """
        model, config = self._backbone.model, self._backbone.config
        b, frames = batch.latents.shape[:2]
        exit_step = draw.shared_integer(f"{turn} exit", len(self._levels))
        noise = draw.normal(f"{turn} noise", (len(self._levels), *batch.latents.shape[1:]))
        rollout = ChunkRollout(model, config.history, batch.latents.shape[2:], batch=b)
        prompt = model.prompt(batch.text)
        frozen_prompt = prompt.detach()
        chunks = [batch.latents[:, : self._given]]
        with torch.no_grad():
            for start in range(0, self._given, config.history.chunk):
                end = start + config.history.chunk
                rollout.commit(batch.latents[:, start:end], frozen_prompt, batch.conditions.frames(start, end))
        for start in range(self._given, frames, config.history.chunk):
            end = start + config.history.chunk
            conditions = batch.conditions.frames(start, end)
            chunk = rollout.denoise(
                noise[:, 0, start:end],
                prompt,
                conditions,
                self._levels,
                partial(_noise_of, noise, start, end),
                exit_step=exit_step,
            )
            rollout.commit(chunk.detach(), frozen_prompt, conditions)
            chunks.append(chunk)
        return torch.cat(chunks, dim=1).float(), self._given

    def _score_levels(self, draw: Draw, turn: str, sample: Tensor) -> Tensor:
        """One noise level per clip, the same for all its frames (b, f)."""
        level = flow.warp(draw.uniform(f"{turn} level"), self._backbone.config.shift)
        level = level.clamp(self._config.min_level, self._config.max_level)
        return level[:, None].expand(-1, sample.shape[1])

    def _guided_real(self, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        prompted = self._predict_clean(self._real, noisy, sigma, batch)
        if self._config.guidance == 1.0:
            return prompted
        nothing = self._backbone.encode([""] * len(noisy))
        bare = flow.to_clean(noisy, self._velocity(self._real, noisy, sigma, batch, nothing), sigma)
        return bare + self._config.guidance * (prompted - bare)

    def _predict_clean(self, model: Transformer, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        return flow.to_clean(noisy, self._velocity(model, noisy, sigma, batch, batch.text), sigma)

    def _velocity(self, model: Transformer, noisy: Tensor, sigma: Tensor, batch: Batch, text: Any) -> Tensor:
        context = Full(noisy.shape[1])
        prompt = model.prompt(text, bidirectional=True)
        return model(noisy, sigma * flow.TIMESTEPS, prompt, context, batch.conditions)  # type: ignore[no-any-return]

    def after_step(self, step: int) -> None:
        if "generator" in self.turns(step):
            self._average.update(self._backbone.model, self._config.ema_decay)

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        with torch.device("meta"):
            model = new_model(self._backbone.config.architecture)
        model.load_state_dict(self._average.full(), assign=True)
        save_backbone(folder, Backbone(model, self._backbone.config), about)


def _noise_of(noise: Tensor, start: int, end: int, step: int) -> Tensor:
    """The noise that follows denoising step `step`, for frames [start, end)."""
    return noise[:, step + 1, start:end]
