import numpy as np
import pytest

from minwm.evaluation.drift import RealRange, appearance, per_second

pytestmark = pytest.mark.unit


def test_appearance_equals_brute_force() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 7, 9, 3), np.uint8)
    for frame, (brightness, contrast, sharpness) in zip(frames, appearance(frames), strict=True):
        light = (0.299 * frame[..., 0] + 0.587 * frame[..., 1] + 0.114 * frame[..., 2]) / 255
        edges = [
            light[y - 1, x] + light[y + 1, x] + light[y, x - 1] + light[y, x + 1] - 4 * light[y, x]
            for y in range(1, 6)
            for x in range(1, 8)
        ]
        assert brightness == pytest.approx(np.mean(light))
        assert contrast == pytest.approx(np.sqrt(np.mean((light - np.mean(light)) ** 2)))
        assert sharpness == pytest.approx(np.mean(np.square(edges)) - np.mean(edges) ** 2)


def test_each_measure_sees_its_own_change() -> None:
    ramp = np.tile(np.linspace(60, 180, 32).astype(np.uint8)[:, None, None], (1, 32, 3))
    noise = np.random.default_rng(1).integers(-20, 20, ramp.shape)
    plain, lit, flat, rough = appearance(
        np.stack([ramp, ramp + 40, (ramp.astype(float) / 2 + 60).astype(np.uint8), (ramp + noise).astype(np.uint8)])
    )
    assert lit[0] > plain[0] + 0.1 and lit[1] == pytest.approx(plain[1])
    assert flat[1] == pytest.approx(plain[1] / 2, rel=0.02) and flat[0] == pytest.approx(plain[0], abs=0.01)
    assert rough[2] > 10 * plain[2]


def test_a_ramp_leaves_the_range_of_real_frames_when_it_passes_the_percentiles() -> None:
    real = np.random.default_rng(2).uniform(0.2, 0.6, (50_000, 3))
    bounds = RealRange.of(real)
    assert bounds.low == pytest.approx([0.204] * 3, abs=1e-3) and bounds.high == pytest.approx([0.596] * 3, abs=1e-3)
    ramp = np.full((101, 3), 0.4)
    ramp[:, 1] = np.linspace(0, 1, 101)  # contrast alone drifts
    inside = bounds.inside(ramp)
    assert np.flatnonzero(inside).tolist() == list(range(21, 60))


def test_real_frames_are_in_range_in_every_measure_98_times_in_a_hundred() -> None:
    real = np.random.default_rng(3).normal(size=(20_000, 3))
    assert RealRange.of(real).inside(real).mean() == pytest.approx(0.98**3, abs=0.002)


def test_means_per_second_at_a_rate_that_is_not_whole() -> None:
    values = np.arange(42.0)  # 2.4 s at 17.5 frames a second: 18, 17 and 7 frames
    assert per_second(values, 17.5) == pytest.approx([8.5, 26.0, 38.0])
