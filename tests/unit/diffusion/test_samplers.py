"""Samplers on flows whose answer is known."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minwm.diffusion.flow import schedule
from minwm.diffusion.samplers import consistency, euler

pytestmark = pytest.mark.unit

POINT = torch.tensor([1.5, -2.0, 0.25, 4.0], dtype=torch.float64)


def to_point(x: Tensor, sigma: float) -> Tensor:
    """The exact velocity of data that is one point: (x − point) / σ."""
    return (x - POINT) / sigma


@given(steps=st.integers(1, 8), shift=st.floats(1, 10), seed=st.integers(0, 1000))
def test_both_samplers_find_a_point_mass_in_any_number_of_steps(steps: int, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    noise, levels = torch.randn(4, dtype=torch.float64), schedule(steps, shift)
    fresh = torch.randn(steps, 4, dtype=torch.float64)
    torch.testing.assert_close(consistency(to_point, noise, levels, lambda i: fresh[i]), POINT)
    torch.testing.assert_close(euler(to_point, noise, levels), POINT)


def test_euler_converges_at_first_order_to_the_solution_of_the_flow() -> None:
    """Data N(0, 2²): the ODE carries noise ε at σ = 1 to 2·ε at σ = 0."""

    def gaussian(x: Tensor, sigma: float) -> Tensor:
        # E[ε − x0 | x] for x = (1 − σ)·x0 + σ·ε, both Gaussian
        variance = (1 - sigma) ** 2 * 4 + sigma**2
        return x * (sigma - (1 - sigma) * 4) / variance

    noise = torch.tensor([1.0, -0.3], dtype=torch.float64)
    errors = [float((euler(gaussian, noise, schedule(n, 1.0)) - 2 * noise).abs().max()) for n in (50, 100, 200)]
    assert errors[2] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_consistency_predicts_noises_again_and_predicts() -> None:
    torch.manual_seed(0)
    noise, fresh = torch.randn(4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    levels = [1.0, 0.7, 0.4, 0.1]

    def wave(x: Tensor, sigma: float) -> Tensor:
        return torch.sin(3 * x) + sigma

    x = noise
    for i in range(3):
        clean = x - levels[i] * wave(x, levels[i])
        x = (1 - levels[i + 1]) * clean + levels[i + 1] * fresh[i]
    expected = x - 0.1 * wave(x, 0.1)
    torch.testing.assert_close(consistency(wave, noise, levels, lambda i: fresh[i]), expected)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_the_exit_step_s_prediction_is_the_result_and_alone_carries_gradient(exit_step: int) -> None:
    torch.manual_seed(0)
    noise, fresh = torch.randn(4), torch.randn(2, 4)
    levels = [1.0, 0.6, 0.3]
    gains = [torch.tensor(0.5 + i, requires_grad=True) for i in range(3)]
    called: list[float] = []

    def model(x: Tensor, sigma: float) -> Tensor:
        called.append(sigma)
        return gains[levels.index(sigma)] * x

    out = consistency(model, noise, levels, lambda i: fresh[i], exit_step=exit_step)
    assert called == levels[: exit_step + 1], "later steps are not run"
    gradients = torch.autograd.grad(out.sum(), gains, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [i == exit_step for i in range(3)]


def renoise_never(_: int) -> Tensor:
    raise AssertionError("one step needs no fresh noise")


def test_one_step_draws_no_fresh_noise() -> None:
    noise = torch.randn(4, dtype=torch.float64)
    never: Callable[[int], Tensor] = renoise_never
    torch.testing.assert_close(consistency(to_point, noise, [1.0], never), POINT)
