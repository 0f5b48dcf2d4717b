"""Clips to batches."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from minwm.data.clips import Clip
from minwm.errors import ConfigError, DataError
from minwm.models.text import byte_tokens
from minwm.training.batch import PoseNoise, WindowConfig, cut_windows, window_conditions
from minwm.training.draw import Draw

pytestmark = pytest.mark.unit

NewClips = Callable[[int, int], list[Clip]]


def encode(captions: Sequence[str]) -> torch.Tensor:
    return byte_tokens(captions, 12)


def test_a_window_is_a_piece_of_its_clip_with_cameras_relative_to_its_first_frame(new_clips: NewClips) -> None:
    clips, starts = new_clips(20, 9), set()
    batch = cut_windows(clips, Draw(0, 0, range(20)), WindowConfig(frames=4), encode)
    cameras = batch.conditions.cameras
    assert cameras is not None
    for clip, latents, viewmats, intrinsics in zip(
        clips, batch.latents, cameras.viewmats, cameras.intrinsics, strict=True
    ):
        truth = torch.from_numpy(clip.latents).float()
        (start,) = (s for s in range(6) if torch.equal(truth[s : s + 4], latents))
        starts.add(start)
        first = clip.poses[start]
        expected = [np.linalg.inv(pose) @ first for pose in clip.poses[start : start + 4]]
        np.testing.assert_allclose(viewmats, expected, atol=1e-4)
        np.testing.assert_array_equal(intrinsics, clip.intrinsics)
    assert starts == set(range(6)), "every start is drawn, the last one too"


def test_every_frame_knows_its_action_and_motion_the_first_one_s_from_before_the_window(
    new_clips: NewClips,
) -> None:
    clips = new_clips(20, 9)
    batch = cut_windows(clips, Draw(0, 0, range(20)), WindowConfig(frames=4), encode)
    conditions = batch.conditions
    assert conditions.cameras is not None and conditions.actions is not None
    for number, clip in enumerate(clips):
        truth = torch.from_numpy(clip.latents).float()
        (start,) = (s for s in range(6) if torch.equal(truth[s : s + 4], batch.latents[number]))
        assert conditions.actions[number].tolist() == clip.actions[start : start + 4].tolist()
        for frame in range(4):
            before, now = clip.poses[max(start + frame - 1, 0)], clip.poses[start + frame]
            motion = conditions.cameras.motions[number, frame]
            np.testing.assert_allclose(motion, np.linalg.inv(before) @ now, atol=1e-4)


def test_a_crop_shows_the_same_world_through_its_own_intrinsics(new_clips: NewClips) -> None:
    """A point seen at a place of the whole picture is seen at the same place of the scene in the piece."""
    clips, corners = new_clips(40, 4), set()
    batch = cut_windows(clips, Draw(0, 0, range(40)), WindowConfig(frames=4, crop=(2, 3)), encode)
    cameras = batch.conditions.cameras
    assert cameras is not None and batch.conditions.image is not None
    rows, columns = clips[0].latents.shape[-2:]
    assert batch.latents.shape[-2:] == batch.conditions.image.shape[-2:] == (2, 3)
    for clip, piece, (fx, fy, cx, cy) in zip(clips, batch.latents, cameras.intrinsics.tolist(), strict=True):
        whole = torch.from_numpy(clip.latents).float()
        places = ((y, x) for y in range(rows - 1) for x in range(columns - 2))
        ((top, left),) = ((y, x) for y, x in places if torch.equal(whole[:, :, y : y + 2, x : x + 3], piece))
        corners.add((top, left))
        x, y, z = np.random.default_rng(left).uniform(0.5, 2.0, 3)
        wfx, wfy, wcx, wcy = clip.intrinsics.tolist()
        assert left + 3 * (fx * x / z + cx) == pytest.approx(columns * (wfx * x / z + wcx), rel=1e-5)
        assert top + 2 * (fy * y / z + cy) == pytest.approx(rows * (wfy * y / z + wcy), rel=1e-5)
    assert {top for top, _ in corners} == set(range(rows - 1)), "up to every edge"
    assert {left for _, left in corners} == set(range(columns - 2))


def test_a_crop_larger_than_the_picture_is_refused(new_clips: NewClips) -> None:
    with pytest.raises(DataError, match=r"window\.crop"):
        cut_windows(new_clips(1, 4), Draw(0, 0, range(1)), WindowConfig(frames=4, crop=(99, 1)), encode)
    with pytest.raises(ConfigError, match=r"window\.crop"):
        WindowConfig(crop=(0, 4))


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, True), (1.0, False)])
def test_captions_are_dropped_as_often_as_asked(new_clips: NewClips, dropout: float, kept: bool) -> None:
    clips = new_clips(4, 4)
    batch = cut_windows(clips, Draw(0, 0, range(4)), WindowConfig(frames=4, prompt_dropout=dropout), encode)
    expected = byte_tokens([clip.caption if kept else "" for clip in clips], 12)
    assert torch.equal(batch.text, expected)


def test_the_first_image_is_the_first_latent_frame_or_nothing(new_clips: NewClips) -> None:
    clips = new_clips(20, 4)
    draw = Draw(0, 0, range(20))
    given = cut_windows(clips, draw, WindowConfig(frames=4), encode)
    assert given.conditions.image is not None
    assert torch.equal(given.conditions.image[:, :-1], given.latents[:, 0])
    assert given.conditions.image[:, -1].eq(1).all()
    dropped = cut_windows(clips, draw, WindowConfig(frames=4, image_dropout=0.5), encode).conditions.image
    assert dropped is not None
    present = dropped.flatten(1).any(1)
    assert 0 < present.sum() < 20
    assert torch.equal(dropped[present], given.conditions.image[present])


def test_a_sample_s_window_does_not_depend_on_its_batch(new_clips: NewClips) -> None:
    clips, config = new_clips(3, 9), WindowConfig(frames=4, prompt_dropout=0.5)
    together = cut_windows(clips, Draw(0, 0, [10, 11, 12]), config, encode)
    alone = cut_windows(clips[1:2], Draw(0, 0, [11]), config, encode)
    assert torch.equal(alone.latents[0], together.latents[1])
    assert torch.equal(alone.text[0], together.text[1])
    assert torch.equal(alone.conditions.cameras.viewmats[0], together.conditions.cameras.viewmats[1])


def test_a_clip_shorter_than_the_window_is_named(new_clips: NewClips) -> None:
    with pytest.raises(DataError, match="clip clip-0: has 3 latent frames, windows need 4"):
        cut_windows(new_clips(1, 3), Draw(0, 0, [0]), WindowConfig(frames=4), encode)


def test_pose_noise_moves_each_camera_by_its_own_lasting_error_and_nothing_else(new_clips: NewClips) -> None:
    clips = new_clips(30, 8)
    config = WindowConfig(frames=8, prompt_dropout=0.0, pose_noise=PoseNoise(translation=0.5, rotation_degrees=3.0))
    clean = cut_windows(clips, Draw(0, 0, range(30)), WindowConfig(frames=8, prompt_dropout=0.0), encode)
    noisy, later = (cut_windows(clips, Draw(0, step, range(30)), config, encode) for step in (0, 7))
    assert torch.equal(noisy.latents, clean.latents)
    assert torch.equal(noisy.conditions.actions, clean.conditions.actions)
    assert torch.equal(noisy.text, clean.text)
    assert torch.equal(noisy.conditions.cameras.viewmats, later.conditions.cameras.viewmats), "an error of the dataset"
    other = cut_windows(clips, Draw(1, 0, range(30)), config, encode).conditions.cameras
    assert not torch.equal(other.viewmats, noisy.conditions.cameras.viewmats), "the seed's own"
    # a motion is off by two frames' errors: √2 of their deviation, about and along each axis
    off = torch.linalg.solve(clean.conditions.cameras.motions.double(), noisy.conditions.cameras.motions.double())
    turns = torch.stack([off[:, 1:, 2, 1], off[:, 1:, 0, 2], off[:, 1:, 1, 0]]).rad2deg()
    assert float(turns.std()) == pytest.approx(3 * 2**0.5, rel=0.1)
    moves = [np.linalg.inv(clip.poses) @ p for clip, p in zip(clips, _noisy(config, clips), strict=True)]
    assert float(np.stack(moves)[:, :, :3, 3].std()) == pytest.approx(0.5, rel=0.1)


def _noisy(config: WindowConfig, clips: list[Clip]) -> list[np.ndarray]:
    return [config.pose_noise.applied(clip, Draw(0, 0, [0])) for clip in clips]


def test_pose_noise_is_not_negative() -> None:
    with pytest.raises(ConfigError, match=r"pose_noise: -1\.0"):
        PoseNoise(translation=-1.0)


def test_a_window_of_a_batch_is_what_would_have_been_cut_there(new_clips: NewClips) -> None:
    """Frames 3 to 7 of a batch of whole clips against batches of the clips' own pieces."""
    clips = new_clips(3, 9)
    whole = cut_windows(clips, Draw(0, 0, range(3)), WindowConfig(frames=9, image_dropout=0.5), encode)
    latents = whole.latents[:, 3:7]
    got = window_conditions(whole.conditions, latents, 3, 7)
    assert got.cameras is not None and got.image is not None and got.actions is not None
    for i, clip in enumerate(clips):
        expected = [np.linalg.inv(pose) @ clip.poses[3] for pose in clip.poses[3:7]]
        np.testing.assert_allclose(got.cameras.viewmats[i], expected, atol=1e-4)
        before = np.linalg.inv(clip.poses[2]) @ clip.poses[3]
        np.testing.assert_allclose(got.cameras.motions[i, 0], before, atol=1e-4)
        assert got.actions[i].tolist() == clip.actions[3:7].tolist()
        shown = bool(whole.conditions.image[i].any())
        assert torch.equal(got.image[i, :-1], latents[i, 0] * shown)
        assert got.image[i, -1].eq(float(shown)).all()
    assert torch.equal(window_conditions(whole.conditions, whole.latents, 0, 4).image, whole.conditions.image)
