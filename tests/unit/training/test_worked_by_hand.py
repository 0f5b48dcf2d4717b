"""Losses and gradients of every stage for the model v = a·x, whose formulas can be worked by hand, in float64."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minwm.models.backbones import Backbone
from minwm.models.context import History
from minwm.models.wan import WanPrompt
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.batch import Batch, WindowConfig
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.levels import chunk_levels

pytestmark = pytest.mark.unit

WINDOW = WindowConfig(frames=8)
DRAW = Draw(5, 6, range(3))


class Gain(nn.Module):
    """v = a·x with a prompt, b·a·x where `bare` says so by an empty one; knows neither history nor cameras."""

    def __init__(self, like: nn.Module, gain: float) -> None:
        super().__init__()
        self.architecture = like.architecture
        self.gain = nn.Parameter(torch.tensor(gain))

    def prompt(self, text: Tensor, *, bidirectional: bool = False) -> WanPrompt:
        strength = 1.0 if text.any() else 0.5
        return WanPrompt(((torch.tensor(strength), torch.tensor(strength)),))

    def forward(self, latents: Tensor, timesteps: Tensor, prompt: WanPrompt, *_: Any) -> Tensor:
        return prompt.layers[0][0] * self.gain * latents


@pytest.fixture
def gains(tiny_backbone: Backbone) -> Callable[[float], Backbone]:
    """Makes a backbone of a gain; its schedule has shift 3."""
    return lambda gain: Backbone(Gain(tiny_backbone.model, gain), tiny_backbone.config, tiny_backbone.encode)  # type: ignore[arg-type]


def check(loss: Tensor, parameter: Tensor, value: Tensor, slope: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, [parameter])
    torch.testing.assert_close(loss.detach().double(), value, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-7)


def drawn(purpose: str, shape: tuple[int, ...] = (8, 4, 4, 6)) -> Tensor:
    return DRAW.normal(purpose, shape).double()


def spread(levels: Tensor) -> Tensor:
    """Levels (b, f) over latents, float64."""
    return levels.double()[:, :, None, None, None]


def regression(x0: Tensor, noise: Tensor, sigma: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """mean (a·x_σ − (ε − x0))² and its slope 2·mean (…)·x_σ."""
    x = (1 - sigma) * x0 + sigma * noise
    error = gain * x - (noise - x0)
    return error.square().mean(), 2 * (error * x).mean()


def test_bidirectional(gains: Callable[[float], Backbone], batch: Batch) -> None:
    backbone = gains(0.3)
    stage = Bidirectional(BidirectionalConfig(window=WINDOW, given_share=0.0), backbone)
    u = DRAW.uniform("level").double()
    sigma = spread((3 * u / (1 + 2 * u))[:, None])
    expected = regression(batch.latents.double(), drawn("noise"), sigma, 0.3)
    check(stage.loss("generator", batch, DRAW)[0], backbone.model.gain, *expected)


def test_autoregressive(gains: Callable[[float], Backbone], batch: Batch) -> None:
    backbone = gains(0.3)
    stage = Autoregressive(AutoregressiveConfig(window=WINDOW), backbone)
    sigma = spread(chunk_levels(DRAW, 8, 2, 3.0))
    expected = regression(batch.latents.double(), drawn("noise"), sigma, 0.3)
    check(stage.loss("generator", batch, DRAW)[0], backbone.model.gain, *expected)


def test_consistency(gains: Callable[[float], Backbone], batch: Batch) -> None:
    """Two intervals with shift 3: levels 1, 3/4, 0. Teacher gain 0.4, with guidance 3: (0.2 + 3·0.2)·x = 0.8·x."""
    backbone = gains(0.3)
    stage = Consistency(ConsistencyConfig(window=WINDOW, intervals=2, guidance=3.0), backbone)
    for name, gain in (("teacher", 0.4), ("target", 0.6)):
        {**stage.fixed, **stage.frozen}[name].gain.data.fill_(gain)
    index = DRAW.integer("interval", 2, (4,)).repeat_interleave(2, 1)
    levels = torch.tensor([1.0, 0.75, 0.0], dtype=torch.float64)
    sigma, following = spread(levels[index]), spread(levels[index + 1])
    x = (1 - sigma) * batch.latents.double() + sigma * drawn("noise")
    further = x + (following - sigma) * 0.8 * x
    error = (1 - 0.3 * sigma) * x - (1 - 0.6 * following) * further
    check(
        stage.loss("generator", batch, DRAW)[0],
        backbone.model.gain,
        error.square().mean(),
        2 * (error * -sigma * x).mean(),
    )
    assert set(index.unique().tolist()) == {0, 1}


def new_dmd(gains: Callable[[float], Backbone], **config: Any) -> DMD:
    """From nothing, the window being one chunk: this model leaves nothing in a cache. The real score has gain 0.4."""
    student = gains(0.3)
    student = replace(student, config=replace(student.config, history=History(chunk=8, window=8)))
    return DMD(DMDConfig(window=WINDOW, score=Path("unused"), context_chunks=0, **config), student, gains(0.4))


@pytest.fixture
def dmd(gains: Callable[[float], Backbone]) -> DMD:
    """One step: x = (1 − 0.3)·z. The critic has gain 0.9."""
    stage = new_dmd(gains, steps=(1,), guidance=3.0)
    stage.networks["critic"].gain.data.fill_(0.9)
    return stage


def score_levels(turn: str) -> Tensor:
    u = DRAW.uniform(f"{turn} level").double()
    return (3 * u / (1 + 2 * u)).clamp(0.02, 0.98)[:, None, None, None, None]


def test_dmd_generator(dmd: DMD, batch: Batch) -> None:
    """Gradient g = (x̂_fake − x̂_real) / mean|x − x̂_real|; loss ½·mean g²; slope mean g·∂x/∂a with ∂x/∂a = −z."""
    z, sigma = drawn("generator noise", (1, 8, 4, 4, 6))[:, 0], score_levels("generator")
    x = 0.7 * z
    noisy = (1 - sigma) * x + sigma * drawn("generator score noise")
    fake, real = noisy - sigma * 0.9 * noisy, noisy - sigma * (0.2 + 3 * 0.2) * noisy
    g = (fake - real) / (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
    loss, _ = dmd.loss("generator", batch, DRAW)
    check(loss, dmd.networks["generator"].gain, 0.5 * g.square().mean(), (g * -z).mean())


def test_dmd_critic(dmd: DMD, batch: Batch) -> None:
    x = 0.7 * drawn("critic noise", (1, 8, 4, 4, 6))[:, 0]
    expected = regression(x, drawn("critic score noise"), score_levels("critic"), 0.9)
    check(dmd.loss("critic", batch, DRAW)[0], dmd.networks["critic"].gain, *expected)


def test_dmd_of_two_steps_goes_by_way_of_fresh_noise(gains: Callable[[float], Backbone], batch: Batch) -> None:
    """Exit at the second step, level 3/4: x1 = ¼·(1 − a)·z + ¾·ε is a constant, x = (1 − ¾·a)·x1."""
    stage = new_dmd(gains, steps=(2,))
    draw = next(d for d in (Draw(0, s, range(3)) for s in range(99)) if d.shared_integer("generator exit", 2) == 1)
    sample = stage._roll_out(batch, draw, "generator").latents
    z, fresh = draw.normal("generator noise", (2, 8, 4, 4, 6)).double().unbind(1)
    x1 = 0.25 * 0.7 * z + 0.75 * fresh
    torch.testing.assert_close(sample.detach().double(), (1 - 0.75 * 0.3) * x1, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(sample.sum(), [stage.networks["generator"].gain])
    torch.testing.assert_close(slope.double(), (-0.75 * x1).sum(), rtol=1e-4, atol=1e-4)
