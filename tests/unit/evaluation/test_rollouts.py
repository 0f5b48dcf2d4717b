import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minwm.data.video import decode_video
from minwm.errors import ConfigError, DataError
from minwm.evaluation.rollouts import Comparison, Psnr, compare, psnr, psnr_table, roll_out, side_by_side, strip
from minwm.models.worlds import World

from .conftest import HEIGHT, WIDTH, MakeClip

pytestmark = pytest.mark.unit


def test_a_rollout_has_eight_frames_for_every_chunk_and_depends_on_the_seed_alone(
    world: World, make_clip: MakeClip
) -> None:
    frames = roll_out(world, make_clip(0), chunks=3, seed=1)
    assert frames.shape == (24, HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, roll_out(world, make_clip(0), chunks=3, seed=1))
    assert not np.array_equal(frames, roll_out(world, make_clip(0), chunks=3, seed=2))


def test_a_longer_rollout_begins_with_the_shorter_one(world: World, make_clip: MakeClip) -> None:
    long, short = (roll_out(world, make_clip(0), chunks=chunks, seed=1).astype(int) for chunks in (4, 2))
    assert np.abs(long[: len(short)] - short).max() <= 1  # rounding: convolutions over another number of frames


def test_a_rollout_follows_the_clips_path_and_no_later_frame(world: World, make_clip: MakeClip) -> None:
    clip, other = make_clip(0), make_clip(1)
    frames = roll_out(world, clip, chunks=3, seed=1)
    assert not np.array_equal(frames, roll_out(world, replace(clip, poses=other.poses), chunks=3, seed=1))
    later = np.concatenate([clip.latents[:2], other.latents[2:]])
    assert np.array_equal(frames, roll_out(world, replace(clip, latents=later), chunks=3, seed=1))
    given = np.concatenate([other.latents[:2], clip.latents[2:]])
    assert not np.array_equal(frames, roll_out(world, replace(clip, latents=given), chunks=3, seed=1))


def test_a_rollout_in_an_offered_number_of_steps(world: World, make_clip: MakeClip) -> None:
    assert len(roll_out(world, make_clip(0), chunks=1, seed=1, steps=1)) == 8
    with pytest.raises(ConfigError, match="steps=3"):
        roll_out(world, make_clip(0), chunks=1, seed=1, steps=3)


def test_clips_that_do_not_fit_are_refused(world: World, make_clip: MakeClip) -> None:
    with pytest.raises(DataError, match="has 12 latent frames, the rollout needs 14"):
        roll_out(world, make_clip(0), chunks=6, seed=0)
    with pytest.raises(DataError, match=r"latents are \(16, 4, 5\), tiny expects \(16, 4, 6\)"):
        roll_out(world, replace(make_clip(0), latents=make_clip(0).latents[..., :5]), chunks=1, seed=0)


def test_the_baselines_equal_brute_force(world: World, make_clip: MakeClip) -> None:
    clip = make_clip(0)
    measured = compare(world, clip, chunks=2, seed=0)
    video = clip.video().astype(np.float64)
    decoded = world.autoencoder.decode(torch.from_numpy(clip.latents[None, :6]).float())[0][0]
    decoded = (decoded.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).double().numpy()
    for frame in range(16):
        true = video[8 + frame]
        for name, guess in (("repeat_last", video[7]), ("autoencoder", decoded[8 + frame])):
            error = sum((a - b) ** 2 for a, b in zip(guess.ravel(), true.ravel(), strict=True)) / true.size
            assert getattr(measured.psnr, name)[frame] == pytest.approx(20 * np.log10(255) - 10 * np.log10(error))
    assert np.array_equal(measured.psnr.generated, psnr(measured.generated, measured.true))
    assert np.array_equal(measured.generated, roll_out(world, clip, chunks=2, seed=0))


def test_the_psnr_of_equal_frames_is_finite() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert psnr(frames, frames) == pytest.approx([58.92, 58.92], abs=0.01)


def _comparison(frames: int) -> Comparison:
    random = np.random.default_rng(frames)
    given, true, generated = (random.integers(0, 256, (n, 16, 24, 3), np.uint8) for n in (8, frames, frames))
    decibels = [random.uniform(10, 30, frames) for _ in range(3)]
    measured = Psnr(generated=decibels[0], repeat_last=decibels[1], autoencoder=decibels[2])
    return Comparison(clip="a", given=given, true=true, generated=generated, psnr=measured)


def test_the_table_averages_clips_at_the_horizons_that_are_reached() -> None:
    both = [_comparison(16), _comparison(16)]
    both[1] = replace(both[1], psnr=replace(both[1].psnr, generated=both[1].psnr.generated + 2))
    table = psnr_table(both, fps=16.0)
    assert [row["seconds"] for row in table["at"]] == [0.5, 1.0]
    assert table["at"][0]["generated"] == pytest.approx(both[0].psnr.generated[7] + 1)
    assert table["per_frame"]["repeat_last"] == pytest.approx(both[0].psnr.repeat_last)
    assert [row["seconds"] for row in psnr_table(both, fps=17.5)["at"]] == [0.5]


def test_pictures_show_true_and_generated_frames() -> None:
    comparison = _comparison(16)
    video = decode_video(side_by_side(comparison, 17.5), where="test", expect=24)
    assert video.shape == (24, 16, 24 + 4 + 24, 3)
    picture = np.asarray(Image.open(io.BytesIO(strip(comparison))))
    assert picture.shape == (16 + 4 + 16, 8 * 24 + 7 * 4, 3)
    assert np.array_equal(picture[:16, :24], comparison.given[-1])
    assert np.array_equal(picture[:16, -24:], comparison.true[-1])
    assert np.array_equal(picture[-16:, -24:], comparison.generated[-1])
