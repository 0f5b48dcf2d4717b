"""Action labels: one meaning, from keys and from poses."""

import math
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.errors import DataError, TrajectoryError
from minwm.geometry.actions import CLASSES, describe, from_keys, from_poses, swap_sides
from minwm.geometry.camera import se3_exp
from minwm.geometry.live import Speeds, advance, velocity_from_keys
from minwm.geometry.trajectory import KEYS, Step, poses

pytestmark = pytest.mark.unit

KEY_SETS = [frozenset(keys) for count in range(len(KEYS) + 1) for keys in combinations(KEYS, count)]
LEVEL_KEY_SETS = [keys for keys in KEY_SETS if not keys & {"u", "dn"}]
starts = st.lists(st.floats(-10, 10), min_size=6, max_size=6).map(lambda twist: se3_exp(np.array(twist)))
distances = st.floats(0.0101, 10)


@settings(max_examples=20)
@given(starts, st.randoms(), distances, st.floats(0.0501, 3.7))
def test_labels_read_off_a_written_trajectory_equal_those_of_its_keys(
    start: NDArray[np.float64], random: Random, distance: float, degrees: float
) -> None:
    held = random.sample(KEY_SETS, len(KEY_SETS))
    path = start @ poses([Step(keys) for keys in held], distance, degrees)
    assert from_poses(path).tolist() == [0, *map(from_keys, held)]


@settings(max_examples=15)
@given(starts, st.randoms(), distances, st.floats(0.0501, 7.4), st.floats(0.01, 2))
def test_labels_read_off_live_control_equal_those_of_the_held_keys(
    start: NDArray[np.float64], random: Random, distance: float, degrees: float, seconds: float
) -> None:
    held = random.sample(KEY_SETS, len(KEY_SETS))
    speeds = Speeds(move=distance / seconds, turn=degrees / seconds)
    path = [start]
    for keys in held:
        path.append(advance(path[-1], velocity_from_keys(keys, speeds), seconds))
    assert from_poses(np.stack(path)).tolist() == [0, *map(from_keys, held)]


@pytest.mark.parametrize("degrees", [7.5, 16.0, 27.0])
def test_on_level_ground_larger_turns_keep_the_labels_of_the_keys(degrees: float) -> None:
    for keys in LEVEL_KEY_SETS:
        velocity = velocity_from_keys(keys, Speeds(move=1.0, turn=degrees))
        assert from_poses(np.stack([np.eye(4), advance(np.eye(4), velocity, 1.0)]))[1] == from_keys(keys)


@pytest.mark.parametrize(
    ("keys", "label", "words"),
    [
        ("", 0, "still"),
        ("w", 9, "forward"),
        ("s", 18, "back"),
        ("a", 27, "left"),
        ("d", 36, "right"),
        ("wa", 45, "forward + left"),
        ("wd", 54, "forward + right"),
        ("sa", 63, "back + left"),
        ("sd", 72, "back + right"),
        ("l", 1, "yaw right"),
        ("j", 2, "yaw left"),
        ("i", 3, "pitch up"),
        ("k", 4, "pitch down"),
        ("li", 5, "yaw right + pitch up"),
        ("lk", 6, "yaw right + pitch down"),
        ("ji", 7, "yaw left + pitch up"),
        ("jk", 8, "yaw left + pitch down"),
        ("sdjk", 80, "back + right, yaw left + pitch down"),
        ("u", 0, "still"),
        ("wsl", 1, "yaw right"),
    ],
)
def test_the_table_of_labels(keys: str, label: int, words: str) -> None:
    assert from_keys(keys) == label
    assert describe(label) == words


def test_every_label_has_its_own_words() -> None:
    assert len({describe(label) for label in range(CLASSES)}) == CLASSES


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_outside_the_table_is_refused(label: int) -> None:
    with pytest.raises(TrajectoryError, match=f"action label {label}: expected 0 to 80"):
        describe(label)
    with pytest.raises(TrajectoryError, match=f"action label {label}: expected 0 to 80"):
        swap_sides(np.array([[3, 4], [label, 5]]))


def test_swapped_labels_are_those_of_the_keys_with_left_and_right_exchanged() -> None:
    mirror = {"a": "d", "d": "a"}
    labels = np.array([from_keys(keys) for keys in KEY_SETS])
    mirrored = [from_keys(mirror.get(key, key) for key in keys) for keys in KEY_SETS]
    assert swap_sides(labels).tolist() == mirrored
    assert set(labels.tolist()) == set(range(CLASSES))


def test_swapping_twice_gives_the_labels_back() -> None:
    labels = np.arange(CLASSES).reshape(3, 27)
    np.testing.assert_array_equal(swap_sides(swap_sides(labels)), labels)
    assert swap_sides(labels).dtype == np.int64


# The nine classes of each half: one of the first pair, one of the second, or one of both.
PUBLISHED_CLASSES = ("", "A", "B", "C", "D", "AC", "AD", "BC", "BD")


def published_label(move: NDArray[np.float64], pitch: float, yaw: float) -> int:
    """What published weights call a move along the camera's axes and a turn of Euler angles in degrees."""
    distance = math.hypot(*move)
    to_x, to_z = (math.degrees(math.acos(move[axis] / distance)) for axis in (0, 2))
    side = "A" * (to_z < 60) + "B" * (to_z > 120) + "C" * (to_x < 60) + "D" * (to_x > 120)
    turn = "A" * (yaw > 0.05) + "B" * (yaw < -0.05) + "C" * (pitch > 0.05) + "D" * (pitch < -0.05)
    return 9 * PUBLISHED_CLASSES.index(side if distance > 0.01 else "") + PUBLISHED_CLASSES.index(turn)


def about(axis: int, degrees: float) -> NDArray[np.float64]:
    """The rotation (3, 3) about an axis."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    rotation = np.eye(3)
    rotation[first, first] = rotation[second, second] = math.cos(math.radians(degrees))
    rotation[second, first] = math.sin(math.radians(degrees))
    rotation[first, second] = -rotation[second, first]
    return rotation


@settings(max_examples=30)
@given(starts, st.integers(0, 2**32 - 1))
def test_swapped_labels_are_those_the_published_weights_were_trained_on(start: NDArray[np.float64], seed: int) -> None:
    random = np.random.default_rng(seed)
    path, expected = [start], [0]
    for _ in range(100):
        direction = random.standard_normal(3) * [1, random.integers(2), 1]
        move = direction / np.linalg.norm(direction) * 10 ** random.uniform(-3, 1)
        # pitch and roll up to 180°, yaw up to 90°, many of them near the threshold of 0.05°
        sizes = 10 ** random.uniform(-3, np.log10([179, 89, 179]))
        pitch, yaw, roll = (random.choice([-1, 1], 3) * sizes).tolist()
        step = np.eye(4)
        step[:3, :3] = about(2, roll) @ about(1, yaw) @ about(0, pitch)
        step[:3, 3] = move
        path.append(path[-1] @ step)
        expected.append(published_label(move, pitch, yaw))
    assert swap_sides(from_poses(np.stack(path))).tolist() == expected


@given(st.floats(0, 180), st.floats(0.02, 3))
def test_a_move_counts_along_the_axes_it_is_near(degrees: float, distance: float) -> None:
    angle = math.radians(degrees)
    path = np.stack([np.eye(4), np.eye(4)])
    path[1, [0, 2], 3] = distance * math.sin(angle), distance * math.cos(angle)
    if min(abs(degrees - border) for border in (30, 60, 120, 150)) < 1e-6:
        return
    expected = "w" * (degrees < 60) + "s" * (degrees > 120) + "d" * (30 < degrees < 150)
    assert from_poses(path)[1] == from_keys(expected)


def test_moves_and_turns_under_the_thresholds_are_still() -> None:
    path = poses([Step(frozenset("wl"), 5)], distance=0.0099, degrees=0.049)
    assert from_poses(path).tolist() == [0] * 6
    assert from_poses(path, min_distance=0.009, min_degrees=0.04).tolist() == [0] + [from_keys("wl")] * 5


def test_a_single_pose_has_the_label_of_stillness() -> None:
    labels = from_poses(np.eye(4)[None])
    assert labels.tolist() == [0] and labels.dtype == np.int64


def test_a_pose_that_is_not_finite_is_refused() -> None:
    path = poses([Step(frozenset("w"), 3)])
    path[2, 0, 3] = math.nan
    with pytest.raises(DataError, match="frame 2"):
        from_poses(path)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(TrajectoryError, match="unknown key 'x'"):
        from_keys("wx")
