"""Noise levels that training draws, and what an error at a level counts.

Levels are float32 in (0, 1): a uniform or a logit-normal draw, moved towards noise by the schedule's shift.
`made_for` says at which levels a student samples, in each of the numbers of steps that it is trained for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from minwm.diffusion import flow
from minwm.errors import ConfigError
from minwm.models.presets import WorldConfig
from minwm.training.draw import Draw

_TABLE = 1000  # levels over which the bell's mean is one


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """How often a level is drawn, and its weight in the loss.

    density:   of the level before the shift. `uniform` (minWM's Wan line), or `logit_normal`: the sigmoid of a
               standard normal, which favours middle levels (Stable Diffusion 3, arXiv 2403.03206; HunyuanVideo)
    shift:     of the draw; the backbone's own if not given
    weighting: `none`, or `bell`: exp(−2(σ − ½)²) less its value at the ends, of mean one over the shifted schedule
               (minWM's Wan line). It gives pure noise no weight at all: good for fine-tuning a model that knows how
               to begin, bad for training from scratch
    """

    density: Literal["uniform", "logit_normal"] = "uniform"
    shift: float | None = None
    weighting: Literal["none", "bell"] = "none"

    def __post_init__(self) -> None:
        if self.shift is not None and not self.shift > 0:
            raise ConfigError(f"levels.shift={self.shift}: expected a positive number")

    def draw(self, draw: Draw, shift: float, count: int = 1) -> Tensor:
        """Levels (b, count); `shift` is the backbone's."""
        if self.density == "uniform":
            level = draw.uniform("level", (count,))
        else:
            level = draw.normal("level", (count,)).sigmoid()
        return flow.warp(level, self.shift or shift)

    def weight(self, sigma: Tensor, shift: float) -> Tensor:
        """What an error at levels σ counts, float32, the shape of σ."""
        if self.weighting == "none":
            return torch.ones_like(sigma)
        table = torch.tensor(flow.schedule(_TABLE, self.shift or shift), dtype=torch.float64)
        return _bell(sigma) / float(_bell(table).mean())


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5).square()) - math.exp(-0.5)


def chunk_levels(draw: Draw, frames: int, chunk: int, shift: float, config: LevelsConfig | None = None) -> Tensor:
    """A noise level per chunk, (b, frames), for a whole number of chunks."""
    return (config or LevelsConfig()).draw(draw, shift, frames // chunk).repeat_interleave(chunk, 1)


def made_for(config: WorldConfig, steps: Sequence[int]) -> WorldConfig:
    """The configuration of a student that samples in these numbers of steps, and in no others.

    Its levels are the configuration's where it has that number, else the shifted schedule's.
    """
    levels = {count: config.levels.get(count) or tuple(flow.schedule(count, config.shift)) for count in sorted(steps)}
    return replace(config, levels=levels)


def require_steps(steps: Sequence[int]) -> None:
    """Raise ConfigError unless `steps` are numbers of sampling steps, each once."""
    if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
        raise ConfigError(f"steps={list(steps)}: expected different numbers of sampling steps, such as [8, 4, 2, 1]")
