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
from minwm.geometry.actions import CLASSES, describe, from_keys, from_poses
from minwm.geometry.camera import se3_exp
from minwm.geometry.trajectory import KEYS, Step, poses

pytestmark = pytest.mark.unit

starts = st.lists(st.floats(-10, 10), min_size=6, max_size=6).map(lambda twist: se3_exp(np.array(twist)))


@settings(max_examples=20, deadline=None)
@given(starts, st.randoms())
def test_labels_read_off_poses_equal_those_of_the_keys(start: NDArray[np.float64], random: Random) -> None:
    held = [frozenset(keys) for count in range(len(KEYS) + 1) for keys in combinations(KEYS, count)]
    random.shuffle(held)
    path = start @ poses([Step(keys) for keys in held])
    assert from_poses(path).tolist() == [0, *map(from_keys, held)]


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
    with pytest.raises(TrajectoryError, match=f"action label {label}"):
        describe(label)


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
