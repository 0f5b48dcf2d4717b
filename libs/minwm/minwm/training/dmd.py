"""Stage 4: asymmetric distribution matching distillation with self-rollout.

The causal student generates clips from its own cache, exactly as it is served; two bidirectional scores, one of the
data (frozen) and one of the student (the critic, trained along), say which way its samples should move (DMD,
arXiv 2311.18828; Self Forcing, arXiv 2506.08009). The scores are asked at the timestep of the noise that was really
added. What a step draws once for all its samples: the number of sampling steps, the exit step inside it, and, where
the student rolls past the scores' window, the window of the rollout that they see.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.diffusion import flow
from minwm.diffusion.samplers import guided
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, new_model, save_backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Full
from minwm.models.rollout import ChunkRollout
from minwm.models.transformer import Transformer
from minwm.training.autoregressive import ContextNoise
from minwm.training.average import Average
from minwm.training.batch import Batch, WindowConfig, cut_windows, unprompted, window_conditions
from minwm.training.draw import Draw
from minwm.training.levels import made_for, require_steps


@dataclass(frozen=True, kw_only=True)
class DMDConfig:
    """How the student rolls out, and how it is scored.

    window:         what the scores see of a rollout
    score:          folder of the bidirectional model that both scores start from
    steps:          numbers of sampling steps that the one set of weights is for; one of them is drawn per step
    rollout_frames: latent frames of a rollout, at least the window's, which they are if not given. Gradient flows
        through the window's chunks alone; those before it are denoised in full, as they are when served
    critic_ratio:   critic updates for each of the generator's, one of them in the same step (minWM's Wan line: 5; its
        HunyuanVideo line alternates one step of the generator and four of the critic: 4)
    guidance:       of the real score, bare + g·(prompted − bare); minWM writes prompted + g·(prompted − bare), so its
        3 is 4 here
    context_chunks: true chunks the rollout starts from (0: from nothing)
    context_noise:  highest level of the noise on what the rollout commits; see `ContextNoise`
    min_level, max_level: range of the noise at which the scores are compared
    """

    window: WindowConfig = WindowConfig()
    score: Path
    steps: tuple[int, ...] = (8, 4, 2, 1)
    rollout_frames: int | None = None
    critic_ratio: int = 5
    guidance: float = 1.0
    context_chunks: int = 1
    context_noise: float = 0.0
    min_level: float = 0.02
    max_level: float = 0.98
    ema_decay: float = 0.95

    def __post_init__(self) -> None:
        require_steps(self.steps)
        if self.critic_ratio < 1 or self.context_chunks < 0 or not 0 <= self.context_noise < 1:
            raise ConfigError(
                f"critic_ratio={self.critic_ratio}, context_chunks={self.context_chunks}, "
                f"context_noise={self.context_noise}: expected at least 1, at least 0, and 0 to below 1"
            )
        if not 0 <= self.min_level < self.max_level <= 1:
            raise ConfigError(
                f"min_level={self.min_level}, max_level={self.max_level}: expected 0 <= min_level < max_level <= 1"
            )
        if self.rollout_frames is not None and self.rollout_frames < self.window.frames:
            raise ConfigError(
                f"rollout_frames={self.rollout_frames}: expected at least window.frames={self.window.frames}"
            )


@dataclass(frozen=True)
class _Sample:
    """The window of a rollout that is scored: latents (b, f, c, y, x) float32, of which the first `given` are true."""

    latents: Tensor
    conditions: Conditions
    given: int


class DMD:
    """Match the distribution of self-generated clips to the data's."""

    def __init__(self, config: DMDConfig, backbone: Backbone, score: Backbone) -> None:
        history = backbone.config.history
        self._frames = config.rollout_frames or config.window.frames
        history.require_chunks(config.window.frames)
        history.require_chunks(self._frames)
        given = config.context_chunks * history.chunk
        if given >= config.window.frames:
            raise ConfigError(
                f"context_chunks={config.context_chunks}: gives {given} frames, "
                f"expected fewer than window.frames={config.window.frames}, so that some are generated"
            )
        self._config, self._given = config, given
        self._backbone = replace(backbone, config=made_for(backbone.config, config.steps))
        self._real = score.model.requires_grad_(False)
        self._critic = copy.deepcopy(score.model).requires_grad_(True)
        self._average = Average(backbone.model)
        self.networks: Mapping[str, nn.Module] = {"generator": backbone.model, "critic": self._critic}
        self.frozen: Mapping[str, nn.Module] = {"average": self._average}
        self.fixed: Mapping[str, nn.Module] = {"score": self._real}

    def turns(self, step: int) -> Sequence[str]:
        return ("generator", "critic") if step % self._config.critic_ratio == 0 else ("critic",)

    def prepare(self, samples: Sequence[Clip], draw: Draw) -> Batch:
        return cut_windows(samples, draw, replace(self._config.window, frames=self._frames), self._backbone.encode)

    def loss(self, turn: str, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        if turn == "generator":
            return self._generator_loss(batch, draw)
        return self._critic_loss(batch, draw)

    def _generator_loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """DMD's equation 7: the sample is pulled along the scores' difference. In float64: what is pulled is small."""
        sample = self._roll_out(batch, draw, "generator")
        made = sample.latents[:, sample.given :].double()
        sigma = self._score_levels(draw, "generator", sample)
        noise = draw.normal("generator score noise", sample.latents.shape[1:])
        with torch.no_grad():
            noisy = flow.add_noise(sample.latents, noise, sigma)
            fake = flow.to_clean(noisy, self._velocity(self._critic, noisy, sigma, sample, batch.text), sigma)
            real = flow.to_clean(noisy, self._guided_real(noisy, sigma, sample, batch), sigma)
            scale = (sample.latents - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
            gradient = ((fake - real) / scale)[:, sample.given :]
        loss = 0.5 * (made - (made - gradient).detach()).square().mean()
        return loss.float(), {"dmd_gradient": float(gradient.abs().mean())}

    def _critic_loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            sample = self._roll_out(batch, draw, "critic")
        sigma = self._score_levels(draw, "critic", sample)
        noise = draw.normal("critic score noise", sample.latents.shape[1:])
        noisy = flow.add_noise(sample.latents, noise, sigma)
        predicted = self._velocity(self._critic, noisy, sigma, sample, batch.text)
        return (predicted.float() - flow.velocity(sample.latents, noise)).square().mean(), {}

    def _roll_out(self, batch: Batch, draw: Draw, turn: str) -> _Sample:
        """The student's clip, up to the end of the window that is scored.

        Of each chunk in the window the exit step's prediction is the result, and it alone carries gradient. History is
        committed without gradient, as clean.
        """
        model, config, shape = self._backbone.model, self._backbone.config, batch.latents.shape[2:]
        chunk, levels, exit_step = config.history.chunk, *self._plan(draw, turn)
        start = chunk * draw.shared_integer(f"{turn} window", (self._frames - self._config.window.frames) // chunk + 1)
        end = start + self._config.window.frames
        noise = draw.normal(f"{turn} noise", (len(levels), end, *shape))
        forgiven = ContextNoise.drawn(draw, f"{turn} context", (end, *shape), chunk, self._config.context_noise)
        rollout = ChunkRollout(model, config.history, shape, batch=len(batch.latents))
        prompt = model.prompt(batch.text)
        committed = prompt.detach()
        made: list[Tensor] = []
        for first in range(0, end, chunk):
            now, scored = slice(first, first + chunk), first >= start
            conditions = batch.conditions.frames(now.start, now.stop)
            if first < self._given:
                latents = batch.latents[:, now]
            else:
                with torch.set_grad_enabled(scored and torch.is_grad_enabled()):
                    latents = rollout.denoise(
                        noise[:, 0, now],
                        prompt,
                        conditions,
                        levels,
                        partial(_noise_of, noise, now),
                        exit_step=exit_step if scored else None,
                    ).float()
            if now.stop < end:
                rollout.commit(forgiven.onto(latents.detach(), first), committed, conditions)
            if scored:
                made.append(latents)
        window = torch.cat(made, dim=1)
        return _Sample(window, window_conditions(batch.conditions, window, start, end), max(0, self._given - start))

    def _plan(self, draw: Draw, turn: str) -> tuple[tuple[float, ...], int]:
        """The step's noise levels, of a number of sampling steps that is drawn, and its exit step among them."""
        steps = self._config.steps[draw.shared_integer(f"{turn} steps", len(self._config.steps))]
        return self._backbone.config.sampling_levels(steps), draw.shared_integer(f"{turn} exit", steps)

    def _score_levels(self, draw: Draw, turn: str, sample: _Sample) -> Tensor:
        """One noise level per clip, the same for all its frames (b, f)."""
        level = flow.warp(draw.uniform(f"{turn} level"), self._backbone.config.shift)
        level = level.clamp(self._config.min_level, self._config.max_level)
        return level[:, None].expand(-1, sample.latents.shape[1])

    def _guided_real(self, noisy: Tensor, sigma: Tensor, sample: _Sample, batch: Batch) -> Tensor:
        prompted = self._velocity(self._real, noisy, sigma, sample, batch.text)
        if self._config.guidance == 1.0:
            return prompted
        bare = self._velocity(self._real, noisy, sigma, sample, unprompted(batch, self._backbone.encode))
        return guided(prompted, bare, self._config.guidance)

    def _velocity(self, model: Transformer, noisy: Tensor, sigma: Tensor, sample: _Sample, text: Any) -> Tensor:
        prompt = model.prompt(text, bidirectional=True)
        return model(noisy, sigma * flow.TIMESTEPS, prompt, Full(noisy.shape[1]), sample.conditions)  # type: ignore[no-any-return]

    def after_step(self, step: int) -> None:
        if "generator" in self.turns(step):
            self._average.update(self._backbone.model, self._config.ema_decay)

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        with torch.device("meta"):
            model = new_model(self._backbone.config.architecture)
        model.load_state_dict(self._average.full(), assign=True)
        save_backbone(folder, Backbone(model, self._backbone.config), about)


def _noise_of(noise: Tensor, frames: slice, step: int) -> Tensor:
    """The noise that follows denoising step `step`, for some frames."""
    return noise[:, step + 1, frames]
