"""Flow matching: levels, conversions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minwm.diffusion.flow import add_noise, schedule, to_clean, velocity, warp

pytestmark = pytest.mark.unit


def test_the_few_step_levels_of_shift_5_are_the_reference_s() -> None:
    assert [1000 * level for level in schedule(4, 5.0)] == pytest.approx([1000, 937.5, 833.3333, 625])


@given(steps=st.integers(1, 100), shift=st.floats(1, 20))
def test_a_schedule_falls_from_noise_and_stops_short_of_the_data(steps: int, shift: float) -> None:
    levels = schedule(steps, shift)
    assert len(levels) == steps
    assert levels[0] == pytest.approx(1, abs=1e-12)
    assert all(before > after > 0 for before, after in itertools.pairwise(levels))


@given(sigma=st.floats(0, 1), shift=st.floats(0.1, 20))
def test_warping_keeps_the_ends_and_is_undone_by_the_inverse_shift(sigma: float, shift: float) -> None:
    level = torch.tensor(sigma, dtype=torch.float64)
    assert -1e-12 <= float(warp(level, shift)) <= 1 + 1e-12
    assert float(warp(warp(level, shift), 1 / shift)) == pytest.approx(sigma, abs=1e-12)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(warp(ends, shift), ends)


@given(seed=st.integers(0, 1000))
def test_the_true_velocity_leads_from_any_level_back_to_the_data(seed: int) -> None:
    torch.manual_seed(seed)
    clean, noise, sigma = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3)
    noisy = add_noise(clean, noise, sigma)
    torch.testing.assert_close(to_clean(noisy, velocity(clean, noise), sigma), clean, rtol=0, atol=1e-6)


def test_each_frame_is_noised_to_its_own_level() -> None:
    clean, noise = torch.randn(1, 3, 2, 2, 2), torch.randn(1, 3, 2, 2, 2)
    noisy = add_noise(clean, noise, torch.tensor([[0.0, 1.0, 0.25]]))
    assert torch.equal(noisy[:, 0], clean[:, 0])
    assert torch.equal(noisy[:, 1], noise[:, 1])
    torch.testing.assert_close(noisy[:, 2], 0.75 * clean[:, 2] + 0.25 * noise[:, 2])


def test_neighbouring_levels_stay_apart_where_bf16_could_not_tell_them() -> None:
    """Of a prediction made in bf16, the clean estimate is still float32."""
    torch.manual_seed(0)
    noisy, predicted = torch.randn(1, 1, 8), torch.randn(1, 1, 8).bfloat16()
    one, other = torch.tensor([[0.9995]]), torch.tensor([[0.9985]])
    assert one.bfloat16() == other.bfloat16()
    apart = to_clean(noisy, predicted, one) - to_clean(noisy, predicted, other)
    torch.testing.assert_close(apart, -0.001 * predicted.float(), rtol=0, atol=1e-6)
