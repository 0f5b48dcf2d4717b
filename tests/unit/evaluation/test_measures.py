from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from minwm.evaluation.judge import load_judge, true_motions
from minwm.evaluation.measures import Critics, Measures, curve_tables, frechet_table, measure
from minwm.evaluation.quality import frechet, psnr, ssim

from .conftest import HEIGHT, WIDTH, MakeClip, Odometer, painted

pytestmark = pytest.mark.unit


def _frames(seed: int, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def test_pixels_need_no_critic() -> None:
    frames, true = _frames(0, 8), _frames(1, 8)
    measured = measure(frames, true, _frames(2, 8), Critics(), 17.5)
    assert np.array_equal(measured.psnr, psnr(frames, true)) and np.array_equal(measured.ssim, ssim(frames, true))
    assert measured.perceptual is measured.features is measured.motions is None


def test_motion_is_seen_from_the_last_given_frame_on(make_clip: MakeClip) -> None:
    poses = make_clip(3).poses
    given, frames = painted(range(2)), painted(range(2, 8))
    measured = measure(frames, frames, given, Critics(motion=Odometer(poses)), 17.5)
    assert measured.motions == pytest.approx(true_motions(poses[1:8]))


def test_features_are_those_of_the_first_four_seconds(judge_folder: Path) -> None:
    judge = load_judge(judge_folder)
    frames, true, given = _frames(0, 20), _frames(1, 20), _frames(2, 8)
    measured = measure(frames, true, given, Critics(features=judge), 4.0)
    assert np.array_equal(measured.features, judge.clip_features(frames[:16]))
    assert np.array_equal(measured.perceptual, judge.perceptual(frames, true))
    assert measured.motions is None
    assert measure(frames[:4], true[:4], given, Critics(features=judge), 4.0).features is None, "too short a clip"


def _measures(seed: int, frames: int, *, seen: bool = True) -> Measures:
    random = np.random.default_rng(seed)
    curves = random.uniform(0.1, 30, (3, frames))
    return Measures(
        psnr=curves[0],
        ssim=curves[1],
        perceptual=curves[2] if seen else None,
        features=random.normal(size=5) if seen else None,
    )


def test_tables_average_clips_at_the_horizons_that_are_reached() -> None:
    sources = {name: [_measures(2 * place, 32), _measures(2 * place + 1, 32)] for place, name in enumerate("ab")}
    tables = curve_tables(sources, fps=16.0)
    assert list(tables) == ["psnr", "ssim", "perceptual"]
    assert [row["seconds"] for row in tables["ssim"]["at"]] == [0.5, 1.0, 2.0]
    first, second = sources["b"]
    assert tables["ssim"]["at"][1]["b"] == pytest.approx((first.ssim[15] + second.ssim[15]) / 2)
    assert tables["psnr"]["per_frame"]["b"] == pytest.approx((first.psnr + second.psnr) / 2)
    assert [row["seconds"] for row in curve_tables(sources, fps=17.5)["psnr"]["at"]] == [0.5, 1.0]


def test_what_nobody_saw_has_no_table() -> None:
    blind = [_measures(0, 8, seen=False), _measures(1, 8, seen=False)]
    assert list(curve_tables({"a": blind}, 17.5)) == ["psnr", "ssim"]
    assert frechet_table({"a": blind}, blind, 8, 17.5) == {}


def test_frechet_distances_are_to_the_real_clips_and_say_what_they_rest_on() -> None:
    sets = {name: [_measures(10 * place + n, 8) for n in range(4)] for place, name in enumerate(("a", "b", "real"))}
    real = sets.pop("real")
    table = frechet_table(sets, real, frames=160, fps=16.0)
    stacked = {name: np.stack([one.features for one in found]) for name, found in {**sets, "real": real}.items()}  # type: ignore[misc]
    assert table["b"] == pytest.approx(frechet(stacked["b"], stacked["real"]))
    assert (table["clips"], table["seconds"]) == (4, 4.0)
    assert frechet_table(sets, real, frames=32, fps=16.0)["seconds"] == 2.0
