"""From noise to data in a few calls of a velocity model."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""(noisy tensor, σ) → predicted velocity, same shape."""


def consistency(
    predict: Velocity,
    noise: Tensor,
    levels: Sequence[float],
    renoise: Callable[[int], Tensor],
    *,
    exit_step: int | None = None,
) -> Tensor:
    """Predict the data, noise it again to the next level, and so on: how few-step students sample.

    `renoise(i)` is the fresh noise after step i. With `exit_step`, the steps before it run without
    gradient, that step with, and its prediction is the result (the truncated rollout of Self Forcing,
    arXiv 2506.08009).
    """
    x = noise
    last = len(levels) - 1 if exit_step is None else exit_step
    for i, level in enumerate(levels[:last]):
        with torch.no_grad():
            clean = x - level * predict(x, level)
            x = (1 - levels[i + 1]) * clean + levels[i + 1] * renoise(i)
    return x - levels[last] * predict(x, levels[last])


def euler(predict: Velocity, noise: Tensor, levels: Sequence[float]) -> Tensor:
    """Follow the probability-flow ODE in straight steps: how many-step teachers sample."""
    *_, end = euler_path(predict, noise, levels)
    return end


def euler_path(predict: Velocity, noise: Tensor, levels: Sequence[float]) -> Iterator[Tensor]:
    """The states of `euler` at each of the levels, from the noise on, and the end point after them."""
    x = noise
    yield x
    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        x = x + (following - level) * predict(x, level)
        yield x


def guided(prompted: Tensor, bare: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), bare + g·(prompted − bare) in float32: 1 is none.

    minWM's DMD writes prompted + g·(prompted − bare), which is g + 1 here.
    """
    return bare.float() + guidance * (prompted.float() - bare.float())
