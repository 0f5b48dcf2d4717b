import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.evaluation.quality import frechet, luma, psnr, ssim

pytestmark = pytest.mark.unit


def _frames(seed: int, count: int, height: int = 15, width: int = 18) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def test_the_psnr_of_equal_frames_is_finite() -> None:
    assert psnr(_frames(0, 2), _frames(0, 2)) == pytest.approx([58.92, 58.92], abs=0.01)


def test_psnr_equals_the_textbook_formula() -> None:
    frames, true = _frames(1, 3), _frames(2, 3)
    for place in range(3):
        error = sum((float(a) - float(b)) ** 2 for a, b in zip(frames[place].flat, true[place].flat, strict=True))
        assert psnr(frames, true)[place] == pytest.approx(20 * np.log10(255) - 10 * np.log10(error / true[place].size))


def _brute_force_ssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Every window by itself, weighted means and covariances spelt out."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(np.mean(values))


def test_ssim_equals_brute_force_over_windows() -> None:
    true = _frames(3, 2)
    frames = (0.7 * true + 0.3 * _frames(4, 2) + 5).clip(0, 255).astype(np.uint8)
    expected = [_brute_force_ssim(luma(frames)[place], luma(true)[place]) for place in range(2)]
    assert ssim(frames, true) == pytest.approx(expected, abs=1e-9)
    assert ssim(true, true) == pytest.approx([1.0, 1.0])


def test_luma_is_that_of_bt601() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)[None, None]
    assert luma(colours)[0, 0] == pytest.approx([76.245, 149.685, 29.07, 9.0])


def test_the_frechet_distance_of_known_gaussians() -> None:
    random = np.random.default_rng(5)
    a, b = random.normal((1, -2), (3, 0.5), (200_000, 2)), random.normal((0, 1), (1, 2), (200_000, 2))
    closed_form = (1 - 0) ** 2 + (-2 - 1) ** 2 + (3 - 1) ** 2 + (0.5 - 2) ** 2  # diagonal covariances commute
    assert frechet(a, b) == pytest.approx(closed_form, rel=0.01)


def test_the_frechet_distance_equals_the_matrix_square_root_also_with_fewer_clips_than_dimensions() -> None:
    random = np.random.default_rng(6)
    for clips in (30, 5):
        a, b = random.normal(size=(clips, 8)) @ random.normal(size=(8, 8)), random.normal(0.5, 2, (clips + 1, 8))
        covariances = [np.cov(x, rowvar=False) for x in (a, b)]
        eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)
        expected = (
            np.square(a.mean(0) - b.mean(0)).sum()
            + np.trace(covariances[0] + covariances[1])
            - 2 * np.sqrt(eigenvalues).sum()
        )
        assert frechet(a, b) == pytest.approx(expected, rel=1e-6), f"{clips} clips"


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6))
def test_the_frechet_distance_is_one_of_gaussians(seed: int, clips: int, width: int) -> None:
    random = np.random.default_rng(seed)
    a, b, shift = random.normal(size=(clips, width)), random.normal(size=(clips + 1, width)), random.normal(size=width)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9), "of a set to itself"
    assert frechet(a, b) == pytest.approx(frechet(b, a)), "there and back"
    assert frechet(a, a + shift) == pytest.approx(np.square(shift).sum()), "of a set to itself moved"
    turn = np.linalg.qr(random.normal(size=(width, width)))[0]
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b)), "in another basis"
