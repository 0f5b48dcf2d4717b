"""Stage 3a: causal ODE distillation of the autoregressive teacher.

Of a state of the teacher's trajectory the student predicts, in one call, the trajectory's end point, given clean
history (Causal Forcing, arXiv 2602.02214, equation of stage 2; trajectories.py makes the data). Each chunk is asked at
a level of its own: chunks that are given clean history are problems of their own, so a clip teaches several levels at
once. The levels are those at which the student samples, in any of its numbers of steps, drawn alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minwm.diffusion import flow
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.conditions import Conditions, first_image
from minwm.models.context import teacher_forcing
from minwm.models.prope import Cameras
from minwm.training.autoregressive import denoise_given_clean
from minwm.training.batch import Batch, encoded
from minwm.training.draw import Draw
from minwm.training.trajectories import Trajectory, TrajectorySet


@dataclass(frozen=True, kw_only=True)
class OdeConfig:
    """Nothing to choose: windows, levels and guidance are the trajectories'."""


@dataclass(frozen=True)
class OdeBatch:
    """True windows and what steers them, and the teacher's states (b, s + 1, f, c, y, x), the end point last."""

    window: Batch
    states: Tensor


class Ode:
    """Make one call of the student land where the teacher's trajectory ends."""

    def __init__(self, config: OdeConfig, backbone: Backbone, trajectories: TrajectorySet) -> None:
        if backbone.config.history != trajectories.history:
            raise ConfigError(
                f"history: the student's is {backbone.config.history}, "
                f"expected the one the trajectories were made with, {trajectories.history}"
            )
        self._backbone = replace(backbone, config=replace(backbone.config, levels=trajectories.levels))
        self._levels = trajectories.states
        self.networks: Mapping[str, nn.Module] = {"generator": backbone.model}
        self.frozen: Mapping[str, nn.Module] = {}
        self.fixed: Mapping[str, nn.Module] = {}

    def turns(self, step: int) -> Sequence[str]:
        return ("generator",)

    def prepare(self, samples: Sequence[Trajectory], draw: Draw) -> OdeBatch:
        captions = tuple(sample.caption for sample in samples)
        clean = _stacked([sample.clean for sample in samples]).float()
        cameras = Cameras(
            viewmats=_stacked([sample.viewmats for sample in samples]),
            intrinsics=_stacked([sample.intrinsics for sample in samples]),
            motions=_stacked([sample.motions for sample in samples]),
        )
        shown = torch.tensor([sample.image for sample in samples])[:, None, None, None]
        actions = _stacked([sample.actions for sample in samples])
        conditions = Conditions(cameras, actions, first_image(clean[:, 0]) * shown).to(draw.device)
        text = encoded(captions, self._backbone.encode, draw.device)
        states = _stacked([sample.states for sample in samples]).float()
        return OdeBatch(Batch(clean.to(draw.device), conditions, text, captions), states.to(draw.device))

    def loss(self, turn: str, batch: OdeBatch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        window, model, history = batch.window, self._backbone.model, self._backbone.config.history
        b, frames = window.latents.shape[:2]
        levels = torch.tensor(self._levels, device=window.latents.device)
        index = draw.integer("level", len(levels), (frames // history.chunk,)).repeat_interleave(history.chunk, 1)
        sigma = levels[index]
        noisy = batch.states[torch.arange(b)[:, None], index, torch.arange(frames)]
        predicted = denoise_given_clean(
            model,
            noisy,
            window.latents,
            sigma,
            model.prompt(window.text),
            window.conditions,
            teacher_forcing(frames, history),
        )
        return (flow.to_clean(noisy, predicted, sigma) - batch.states[:, -1]).square().mean(), {}

    def after_step(self, step: int) -> None:
        pass

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_backbone(folder, self._backbone, about)


def _stacked(arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
