"""Stage 3b: causal consistency distillation of the autoregressive teacher.

The student's prediction at a noise level must agree with its own slow average's prediction one step of the teacher's
ODE further down, both given clean history (Causal Forcing++, arXiv 2605.15141). Each chunk has an interval of its own,
any of them: chunks that are given clean history are problems of their own, and so one set of weights learns every
level, whatever the number of steps it samples in. Levels stay float32: neighbouring ones are closer than bf16 can tell.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.data.clips import Clip
from minwm.diffusion import flow
from minwm.diffusion.samplers import guided
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.context import teacher_forcing
from minwm.models.transformer import Transformer
from minwm.training.autoregressive import denoise_given_clean
from minwm.training.average import update_average
from minwm.training.batch import Batch, WindowConfig, cut_windows, unprompted
from minwm.training.draw import Draw


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """How the student is made to agree with itself.

    intervals: steps of the teacher's ODE; where a multiple of the sampling steps (48 of 8, 4, 2 and 1), the levels that
        the student samples at are among those it is trained at
    guidance:  of the teacher; 1 is none
    ema_decay: of the target
    """

    window: WindowConfig = WindowConfig()
    intervals: int = 50
    guidance: float = 1.0
    ema_decay: float = 0.95

    def __post_init__(self) -> None:
        if self.intervals < 1 or not 0 <= self.ema_decay < 1:
            raise ConfigError(
                f"intervals={self.intervals}, ema_decay={self.ema_decay}: expected at least 1, and 0 to below 1"
            )


class Consistency:
    """Make one call of the student land where the teacher's ODE ends."""

    def __init__(self, config: ConsistencyConfig, backbone: Backbone) -> None:
        backbone.config.history.require_chunks(config.window.frames)
        self._config, self._backbone = config, backbone
        self._teacher = copy.deepcopy(backbone.model).requires_grad_(False)
        self._target = copy.deepcopy(backbone.model).requires_grad_(False)
        self.networks: Mapping[str, nn.Module] = {"generator": backbone.model}
        self.frozen: Mapping[str, nn.Module] = {"target": self._target}
        self.fixed: Mapping[str, nn.Module] = {"teacher": self._teacher}

    def turns(self, step: int) -> Sequence[str]:
        return ("generator",)

    def prepare(self, samples: Sequence[Clip], draw: Draw) -> Batch:
        return cut_windows(samples, draw, self._config.window, self._backbone.encode)

    def loss(self, turn: str, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        clean, config = batch.latents, self._backbone.config
        frames, chunk = clean.shape[1], config.history.chunk
        context = teacher_forcing(frames, config.history)
        levels = torch.tensor([*flow.schedule(self._config.intervals, config.shift), 0.0], device=clean.device)
        index = draw.integer("interval", self._config.intervals, (frames // chunk,)).repeat_interleave(chunk, 1)
        sigma, following = levels[index], levels[index + 1]
        noisy = flow.add_noise(clean, draw.normal("noise", clean.shape[1:]), sigma)

        def predict(model: Transformer, x: Tensor, level: Tensor, text: Any) -> Tensor:
            return denoise_given_clean(model, x, clean, level, model.prompt(text), batch.conditions, context)

        with torch.no_grad():
            velocity = predict(self._teacher, noisy, sigma, batch.text).float()
            if self._config.guidance != 1:
                bare = predict(self._teacher, noisy, sigma, unprompted(batch, self._backbone.encode))
                velocity = guided(velocity, bare, self._config.guidance)
            further = noisy + flow.expand(following - sigma, noisy) * velocity
            goal = flow.to_clean(further, predict(self._target, further, following, batch.text), following)
        mine = flow.to_clean(noisy, predict(self._backbone.model, noisy, sigma, batch.text), sigma)
        return (mine - goal).square().mean(), {}

    def after_step(self, step: int) -> None:
        update_average(self._target, self._backbone.model, self._config.ema_decay)

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_backbone(folder, Backbone(self._target, self._backbone.config), about)
