"""Noise levels: their density, their weight, and those of a student."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minwm.diffusion.flow import schedule
from minwm.errors import ConfigError
from minwm.models.presets import WorldConfig, preset
from minwm.training.draw import Draw
from minwm.training.levels import LevelsConfig, made_for, require_steps

pytestmark = pytest.mark.unit

CASES: list[tuple[LevelsConfig, Callable[[float], float]]] = [
    (LevelsConfig(), lambda u: u),
    (LevelsConfig(density="logit_normal"), lambda u: 0.5 * (1 + math.erf(math.log(u / (1 - u)) / math.sqrt(2)))),
]


@pytest.mark.parametrize(("config", "below"), CASES, ids=["uniform", "logit_normal"])
def test_levels_have_the_density_they_say_and_the_shift(config: LevelsConfig, below: Callable[[float], float]) -> None:
    drawn = config.draw(Draw(0, 0, range(1000)), 5.0, 4).double().flatten()
    assert drawn.dtype == torch.float64
    unshifted = drawn / (5 - 4 * drawn)  # solves σ' = 5σ / (1 + 4σ) for σ
    for u in (0.1, 0.3, 0.5, 0.8):
        assert float((unshifted < u).double().mean()) == pytest.approx(below(u), abs=0.03)


def test_a_shift_of_its_own_replaces_the_backbone_s() -> None:
    draw = Draw(0, 0, range(10))
    assert torch.equal(LevelsConfig(shift=3.0).draw(draw, 5.0), LevelsConfig().draw(draw, 3.0))


@given(shift=st.floats(1, 10))
def test_the_bell_has_mean_one_over_the_schedule_and_forgets_both_ends(shift: float) -> None:
    config = LevelsConfig(weighting="bell")
    table = torch.tensor(schedule(1000, shift), dtype=torch.float64)
    assert float(config.weight(table, shift).mean()) == pytest.approx(1, rel=1e-9)
    ends = config.weight(torch.tensor([0.0, 1.0]), shift)
    torch.testing.assert_close(ends, torch.zeros(2), rtol=0, atol=1e-6)


def test_the_bell_s_values_are_those_worked_by_hand_from_minwm_s_formula() -> None:
    """y(t) = exp(−2((t − N/2)/N)²), less its minimum, over its mean, N = 1000, t the shifted timesteps."""
    timesteps = [1000 * level for level in schedule(1000, 5.0)]
    y = [math.exp(-2 * ((t - 500) / 1000) ** 2) for t in timesteps]
    y = [value - min(y) for value in y]
    mean = sum(y) / 1000
    sigma = torch.tensor([timesteps[i] / 1000 for i in (100, 500, 900)])
    expected = torch.tensor([y[i] / mean for i in (100, 500, 900)])
    torch.testing.assert_close(LevelsConfig(weighting="bell").weight(sigma, 5.0), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(LevelsConfig().weight(sigma, 5.0), torch.ones(3))


def test_a_student_s_levels_are_its_own_or_the_schedule_s_and_no_others() -> None:
    config: WorldConfig = preset("wan2.1-t2v-1.3b")
    student = made_for(config, (4, 2, 1))
    assert list(student.levels) == [1, 2, 4]
    assert student.levels[4] == config.levels[4]
    assert student.levels[2] == pytest.approx((1.0, 5 * 0.5 / 3))
    with pytest.raises(ConfigError, match=r"steps=50: .* samples in one of \[1, 2, 4\] steps"):
        student.sampling_levels(50)


@pytest.mark.parametrize("steps", [(), (0,), (4, 4)])
def test_steps_are_different_positive_numbers(steps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="expected different numbers of sampling steps"):
        require_steps(steps)


def test_a_shift_is_positive() -> None:
    with pytest.raises(ConfigError, match=r"levels\.shift=0\.0"):
        LevelsConfig(shift=0.0)
