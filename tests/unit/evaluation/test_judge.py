"""The judge: which frames a motion is read from, what it is compared with, and how its error is counted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.data.doom import DoomConfig, record
from minwm.errors import CheckpointError, ConfigError, DataError
from minwm.evaluation.judge import (
    Judge,
    JudgeConfig,
    average_precision,
    correlation,
    estimator_error,
    load_judge,
    motion_error,
    save_judge,
    shrink,
    soft_flow,
    true_motions,
)
from minwm.geometry.live import CameraVelocity, advance
from minwm.models.checkpoints import save_model

pytestmark = pytest.mark.unit

SHIPPED = Path(__file__).parents[3] / "models/doom-judge"
CONFIG = JudgeConfig(labels=("Clip", "Column", "Shell"), scenes=("a:E1M1", "a:E1M2"), widths=(8, 8, 16), trunk=16)


@pytest.fixture
def judge() -> Judge:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Judge(CONFIG).eval().requires_grad_(False)


def play(frames: int, size: tuple[int, int] = (24, 32), seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), np.uint8)


def walk(velocities: list[CameraVelocity], seconds: float = 1.0) -> NDArray[np.float64]:
    """Poses, the first one anywhere."""
    poses = [advance(np.eye(4), CameraVelocity(forward=3.0, right=-2.0, yaw=70.0), 1.0)]
    for velocity in velocities:
        poses.append(advance(poses[-1], velocity, seconds))
    return np.stack(poses)


@pytest.mark.parametrize(
    ("velocity", "motion"),
    [
        (CameraVelocity(right=2.0), (2, 0, 0, 0)),
        (CameraVelocity(forward=-1.5), (0, -1.5, 0, 0)),
        (CameraVelocity(up=0.5), (0, 0, -0.5, 0)),
        (CameraVelocity(yaw=16.0), (0, 0, 0, 16)),
        (CameraVelocity(yaw=-120.0), (0, 0, 0, -120)),
    ],
)
def test_a_motion_is_right_forward_down_and_yaw_to_the_right(
    velocity: CameraVelocity, motion: tuple[float, ...]
) -> None:
    found = true_motions(walk([velocity, velocity]))
    np.testing.assert_allclose(found, [motion, motion], atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1))
def test_true_motions_are_the_relative_poses_whatever_the_world(seed: int) -> None:
    random = np.random.default_rng(seed)
    velocities = [
        CameraVelocity(**dict(zip(("forward", "right", "up", "yaw"), v.tolist(), strict=True)))
        for v in random.normal(0, (2, 2, 1, 60), (5, 4))
    ]
    poses = walk(velocities)
    for motion, before, after in zip(true_motions(poses), poses[:-1], poses[1:], strict=True):
        relative = np.linalg.inv(before) @ after
        expected = [*relative[[0, 2, 1], 3], np.degrees(np.arctan2(relative[0, 2], relative[2, 2]))]
        np.testing.assert_allclose(motion, expected, atol=1e-9)


def test_poses_that_are_not_rigid_are_refused() -> None:
    with pytest.raises(DataError, match="frame 1 is not rigid"):
        true_motions(np.stack([np.eye(4), 2 * np.eye(4)]))


@pytest.mark.parametrize("reach", [(0, 0), (1, 2), (2, 1)])
def test_correlation_equals_brute_force(reach: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(1)
    first, second = (torch.randn(2, 3, 5, 6, generator=random, dtype=torch.float64) for _ in range(2))
    found = correlation(first, second, reach)
    shifts = [(y, x) for y in range(-reach[0], reach[0] + 1) for x in range(-reach[1], reach[1] + 1)]
    assert found.shape == (2, len(shifts), 5, 6)
    for channel, (down, right) in enumerate(shifts):
        for y in range(5):
            for x in range(6):
                inside = 0 <= y + down < 5 and 0 <= x + right < 6
                expected = (first[:, :, y, x] * second[:, :, y + down, x + right]).sum(1) if inside else torch.zeros(2)
                torch.testing.assert_close(
                    found[:, channel, y, x], expected.double(), msg=f"{down}, {right} at {y}, {x}"
                )


@pytest.mark.parametrize("shift", [(0, 0), (1, -2), (-1, 3)])
def test_the_flow_of_a_shifted_picture_is_the_shift(shift: tuple[int, int]) -> None:
    first = torch.nn.functional.normalize(torch.randn(1, 32, 12, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    flow = soft_flow(correlation(first, first.roll(shift, (2, 3)), (2, 3)), (2, 3))
    inner = flow[0, :, 2:-2, 3:-3].flatten(1).median(1).values
    torch.testing.assert_close(inner, torch.tensor(shift).float(), atol=0.1, rtol=0)


def test_a_motion_is_read_from_the_last_frame_of_a_group_and_the_four_after_it(judge: Judge) -> None:
    frames = play(16)
    before = judge.motions(frames)
    assert before.shape == (3, 4)
    for changed in range(16):
        other = frames.copy()
        other[changed] = 255 - other[changed]
        moved = np.abs(judge.motions(other) - before).max(axis=1) > 1e-9
        expected = [4 * k + 3 <= changed <= 4 * k + 7 for k in range(3)]
        assert moved.tolist() == expected, f"frame {changed} changed"


def test_a_mirrored_clip_moves_to_the_other_side(judge: Judge) -> None:
    frames = play(12)
    np.testing.assert_allclose(judge.motions(frames[:, :, ::-1]), judge.motions(frames) * (-1, 1, 1, -1), atol=1e-6)


def test_long_clips_are_judged_as_short_ones(judge: Judge) -> None:
    frames = play(4 * 40)
    apart = [judge.motions(frames[start : start + 8]) for start in range(0, len(frames) - 4, 4)]
    np.testing.assert_allclose(judge.motions(frames), np.concatenate(apart), atol=1e-5)


@pytest.mark.parametrize("size", [(72, 96), (96, 128), (144, 192), (32, 48)])
def test_frames_of_any_size_are_looked_at_in_one(judge: Judge, size: tuple[int, int]) -> None:
    frames = play(8, size)
    frames.flags.writeable = False
    assert shrink(frames).shape == (8, 72, 96, 3)
    np.testing.assert_array_equal(judge.motions(frames), judge.motions(shrink(frames)))
    np.testing.assert_array_equal(judge.motions(frames[::-1]), judge.motions(shrink(frames)[::-1]))


@pytest.mark.parametrize("frames", [play(9), play(4), play(8)[..., :1], play(8).astype(np.float32)])
def test_frames_that_cannot_be_judged_are_refused(judge: Judge, frames: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match=r"frames: got .*, expected"):
        judge.motions(frames)


def test_a_clip_is_the_mean_of_its_windows(judge: Judge) -> None:
    frames = play(70)
    windows = torch.from_numpy(np.stack([shrink(frames)[s : s + 5] for s in range(0, 66, 4)]))
    assert len(windows) == 17
    expected = judge(windows.permute(0, 1, 4, 2, 3) / 255).features.double().mean(0)
    np.testing.assert_allclose(judge.clip_features(frames), expected, atol=1e-6)
    labels, scenes = judge.recognise(frames)
    assert labels.shape == (17, 3) and scenes.shape == (17, 2)
    np.testing.assert_allclose(scenes.sum(1), 1)


def test_the_perceptual_distance_is_that_of_unit_features(judge: Judge) -> None:
    a, b = play(3, seed=1), play(3, seed=2)
    scales = list(zip(judge.frame_features(a), judge.frame_features(b), strict=True))
    assert [left.shape for left, _ in scales] == [(3, 8, 24, 32), (3, 8, 12, 16), (3, 16, 6, 8)]
    by_hand = np.zeros(3)
    for left, right in scales:
        np.testing.assert_allclose(np.linalg.norm(left, axis=1).max(), 1, atol=1e-5)
        for frame in range(3):
            by_hand[frame] += np.square(left[frame].astype(float) - right[frame]).sum(0).mean() / 3
    np.testing.assert_allclose(judge.perceptual(a, b), by_hand, rtol=1e-5)
    np.testing.assert_array_equal(judge.perceptual(a, a), 0)
    with pytest.raises(DataError, match="3 and 2 frames"):
        judge.perceptual(a, b[:2])


def test_a_judge_survives_the_disk(judge: Judge, tmp_path: Path) -> None:
    save_judge(tmp_path / "judge", judge.bfloat16(), {"seed": 3})
    again = load_judge(tmp_path / "judge")
    assert again.config == CONFIG
    frames = play(8)
    np.testing.assert_array_equal(again.motions(frames), judge.float().motions(frames))
    save_model(tmp_path / "other", judge, kind="decoder", config=CONFIG)
    with pytest.raises(CheckpointError, match="holds a 'decoder', expected a 'judge'"):
        load_judge(tmp_path / "other")


@pytest.mark.parametrize("change", [{"labels": ()}, {"widths": (8, 12, 16)}, {"scale": (1.0, 1.0, 0.0, 1.0)}])
def test_impossible_judges_are_refused(change: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        JudgeConfig(**{"labels": ("a",), "scenes": ("b",), **change})  # type: ignore[arg-type]


def test_errors_worked_by_hand() -> None:
    true = np.array([[1.0, 0, 0, 10], [0, -2, 0, -2], [0, 0.1, 0, 0.5], [0, 1, 0.3, 0]])
    said = np.array([[2.0, 0.5, 9, 7], [0, 2, 9, -2], [0, -0.1, 9, -1.5], [1.01, 1, 9, 0]])
    error = motion_error(said, true)
    assert (error.motions, error.turns, error.moves) == (4, 2, 3)
    assert error.turn_direction == 1, "half a degree has no side"
    assert error.move_direction == pytest.approx(1 / 3), "backward said to be forward, and 45.3° off"
    assert error.rotation_error_deg == pytest.approx((3 + 0 + 2 + 0) / 4)
    assert error.rotation_relative == pytest.approx((3 + 0 + 2 + 0) / 12.5)
    lengths = np.sqrt(1.25) + 4 + 0.2 + 1.01
    assert error.translation_error == pytest.approx(lengths / 4)
    assert error.translation_relative == pytest.approx(lengths / 4.1)
    assert error.turn_relative == pytest.approx(3 / 12)
    assert error.move_relative == pytest.approx((np.sqrt(1.25) + 4 + 1.01) / 4)


def test_a_still_clip_has_no_directions_and_nothing_is_no_clip(judge: Judge) -> None:
    error = motion_error(np.ones((2, 4)), np.zeros((2, 4)))
    assert error.turns == error.moves == 0
    assert np.isnan([error.turn_direction, error.move_direction, error.rotation_relative]).all()
    with pytest.raises(DataError, match="none"):
        estimator_error(judge, [])
    with pytest.raises(DataError, match="expected twice the same"):
        motion_error(np.zeros((2, 4)), np.zeros((3, 4)))


def test_an_estimator_that_says_the_truth_has_no_error() -> None:
    class Told:
        def motions(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
            return true_motions(tracks[int(frames[0, 0, 0, 0])])

    random = np.random.default_rng(4)
    tracks = [
        walk([CameraVelocity(forward=f, right=r, yaw=y) for f, r, y in random.normal(0, (4, 4, 40), (6, 3))])
        for _ in range(2)
    ]
    error = estimator_error(Told(), [(np.full((28, 8, 8, 3), i, np.uint8), poses) for i, poses in enumerate(tracks)])
    assert error.motions == 12 and error.turns > 0 and error.moves > 0
    assert (error.turn_direction, error.move_direction, error.rotation_error_deg) == (1, 1, 0)


def test_average_precision_by_hand() -> None:
    scores, true = np.array([0.1, 0.9, 0.8, 0.3]), np.array([False, True, False, True])
    assert average_precision(scores, true) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(-scores, true) == pytest.approx((1 / 2 + 2 / 4) / 2)


@pytest.mark.slow
def test_the_shipped_judge_sees_how_the_camera_of_new_play_moves() -> None:
    config = DoomConfig(scenes=("freedoom1:E1M3",), episodes=1, frames_per_episode=512, height=144, width=192, seed=987)
    episode = next(record(config))
    judge = load_judge(SHIPPED)
    error = estimator_error(judge, [(episode.frames, episode.poses[3::4])])
    assert error.turns > 20 and error.moves > 40
    assert error.turn_direction >= 0.98
    assert error.rotation_relative <= 0.15
    assert error.move_direction >= 0.9
    ghosts = ((episode.frames[1:].astype(np.uint16) + episode.frames[:-1]) // 2).astype(np.uint8)
    here, elsewhere = episode.frames[:500:50], episode.frames[40:500:50]
    nearer = judge.perceptual(here, ghosts[:500:50]) < judge.perceptual(here, elsewhere)
    assert nearer.mean() > 0.8, "a ghost is nearer than a picture from elsewhere"


@pytest.mark.slow
def test_the_shipped_judge_knows_turns_on_four_maps() -> None:
    scenes = ("freedoom1:E1M2", "freedoom1:E1M3", "freedoom1:E1M5", "freedoom1:E1M6")
    config = DoomConfig(scenes=scenes, episodes=4, frames_per_episode=512, height=144, width=192, seed=987)
    episodes = list(record(config))
    judge = load_judge(SHIPPED)
    error = estimator_error(judge, [(episode.frames, episode.poses[3::4]) for episode in episodes])
    assert error.turns > 200 and error.moves > 100
    assert error.turn_direction >= 0.98
    assert error.move_direction >= 0.9
    assert error.turn_relative <= 0.15


@pytest.mark.slow
def test_to_the_shipped_judge_a_ghost_is_nearer_than_another_place() -> None:
    (episode,) = record(DoomConfig(episodes=1, frames_per_episode=240, height=96, width=128, seed=987))
    judge = load_judge(SHIPPED)
    now, later = episode.frames[:200:10], episode.frames[40::10]
    ghosts = ((now.astype(np.uint16) + episode.frames[1:201:10]) // 2).astype(np.uint8)
    assert (judge.perceptual(now, ghosts) < judge.perceptual(now, later)).mean() >= 0.9
