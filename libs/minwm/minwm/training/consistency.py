"""Stage 3: causal consistency distillation of the autoregressive teacher.

The student's prediction at a noise level must agree with its own slow average's prediction one step
of the teacher's ODE further down, both given clean history (Causal Forcing++, arXiv 2605.15141).
Levels stay float32: neighbouring ones are closer than bf16 can tell.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.diffusion import flow
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.context import teacher_forcing
from minwm.models.transformer import Prompt, Transformer
from minwm.training.autoregressive import denoise_given_clean
from minwm.training.average import update_average
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """intervals: steps of the teacher's ODE. guidance: of the teacher, 1 is none. ema_decay: of the target."""

    window: WindowConfig = WindowConfig()
    intervals: int = 50
    guidance: float = 1.0
    ema_decay: float = 0.95


_Predict = Callable[[Transformer, Tensor, Tensor, Prompt], Tensor]
"""Velocity of (model, noisy clip, levels, prompt), given the clip's clean history."""


class Consistency:
    """Make one call of the student land where the teacher's ODE ends."""

    def __init__(self, config: ConsistencyConfig, backbone: Backbone) -> None:
        backbone.config.history.require_chunks(config.window.frames)
        self._config, self._backbone = config, backbone
        self._teacher = copy.deepcopy(backbone.model).requires_grad_(False)
        self._target = copy.deepcopy(backbone.model).requires_grad_(False)
        self.networks: Mapping[str, nn.Module] = {"generator": backbone.model}
        self.frozen: Mapping[str, nn.Module] = {"teacher": self._teacher, "target": self._target}

    def turns(self, step: int) -> Sequence[str]:
        return ("generator",)

    def prepare(self, samples: Sequence[Clip], draw: Draw) -> Batch:
        return cut_windows(samples, draw, self._config.window, self._backbone.encode)

    def loss(self, turn: str, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        clean, config = batch.latents, self._backbone.config
        context = teacher_forcing(clean.shape[1], config.history)
        levels = torch.tensor([*flow.schedule(self._config.intervals, config.shift), 0.0])
        index = draw.integer("interval", self._config.intervals)[:, None].expand(-1, clean.shape[1])
        sigma, following = levels[index], levels[index + 1]
        noisy = flow.add_noise(clean, draw.normal("noise", clean.shape[1:]), sigma)

        def predict(model: Transformer, x: Tensor, level: Tensor, prompt: Prompt) -> Tensor:
            return denoise_given_clean(model, x, clean, level, prompt, batch.conditions, context)

        with torch.no_grad():
            velocity = self._guided(predict, noisy, sigma, batch.text)
            further = noisy + flow.expand(following - sigma, noisy) * velocity
            slow = predict(self._target, further, following, self._target.prompt(batch.text))
            goal = flow.to_clean(further, slow, following)
        model = self._backbone.model
        mine = flow.to_clean(noisy, predict(model, noisy, sigma, model.prompt(batch.text)), sigma)
        return (mine - goal).square().mean(), {}

    def _guided(self, predict: _Predict, noisy: Tensor, sigma: Tensor, text: Any) -> Tensor:
        """The teacher's velocity in float32, with classifier-free guidance where asked for."""
        velocity = predict(self._teacher, noisy, sigma, self._teacher.prompt(text)).float()
        if self._config.guidance == 1.0:
            return velocity
        unprompted = predict(
            self._teacher, noisy, sigma, self._teacher.prompt(self._backbone.encode([""] * len(noisy)))
        ).float()
        return unprompted + self._config.guidance * (velocity - unprompted)

    def after_step(self, step: int) -> None:
        update_average(self._target, self._backbone.model, self._config.ema_decay)

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_backbone(folder, Backbone(self._target, self._backbone.config), about)
