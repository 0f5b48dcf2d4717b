"""The trajectory grammar, its signs and its poses."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.errors import TrajectoryError
from minwm.geometry.camera import invert, relative_viewmats, require_rigid, se3_exp
from minwm.geometry.trajectory import KEYS, MAX_COUNT, Step, motion, parse, poses

pytestmark = pytest.mark.unit

steps_of_any_keys = st.lists(
    st.builds(Step, st.frozensets(st.sampled_from(KEYS), min_size=1), st.integers(1, 12)), min_size=1, max_size=6
)


def straightforward_poses(steps: list[Step], distance: float, degrees: float) -> NDArray[np.float64]:
    """The reference's rule, written as it is stated: rotate about y, then x, then move along the new axes."""
    rotation, place = np.eye(3), np.zeros(3)
    path = [np.eye(4)]
    for keys in (step.keys for step in steps for _ in range(step.count)):
        yaw = math.radians(degrees) * (("l" in keys) - ("j" in keys))
        pitch = math.radians(degrees) * (("i" in keys) - ("k" in keys))
        cos, sin = math.cos(yaw), math.sin(yaw)
        rotation = rotation @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        cos, sin = math.cos(pitch), math.sin(pitch)
        rotation = rotation @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
        move = np.array([("d" in keys) - ("a" in keys), ("dn" in keys) - ("u" in keys), ("w" in keys) - ("s" in keys)])
        place = place + rotation @ (distance * move)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, place
        path.append(pose)
    return np.stack(path)


@given(steps_of_any_keys)
def test_parse_reads_back_what_is_written(steps: list[Step]) -> None:
    text = ", ".join("+".join(step.keys) + f"*{step.count}" for step in steps)
    assert parse(text) == tuple(steps)


def test_count_is_one_where_none_is_given() -> None:
    assert parse("w,w+l*4,dn") == (Step(frozenset("w")), Step(frozenset("wl"), 4), Step(frozenset({"dn"})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the trajectory is empty"),
        (" ", "the trajectory is empty"),
        ("w*3,x*2", r"step 2 \('x\*2'\): unknown key 'x'"),
        ("w+q", r"step 1 \('w\+q'\): unknown key 'q'"),
        ("w*3,", r"step 2 \(''\): unknown key ''"),
        ("W", "unknown key 'W'"),
        ("w*0", "bad count '0'"),
        ("w*-1", "bad count '-1'"),
        ("w*", "bad count ''"),
        ("w*1.5", "bad count '1.5'"),
        ("w*2*3", r"bad count '2\*3'"),
        ("w*٣", "bad count"),
        (f"w*{MAX_COUNT + 1}", "bad count"),
        ("w*" + "9" * 5000, "bad count"),
    ],
)
def test_bad_text_is_refused_by_token_and_place(text: str, message: str) -> None:
    with pytest.raises(TrajectoryError, match=message) as refused:
        parse(text)
    assert " ".join(KEYS) in str(refused.value), "names the known keys"


@given(st.text(alphabet="wsadunjlik+*,0129 ", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        steps = parse(text)
    except TrajectoryError:
        return
    assert all(step.keys <= set(KEYS) and 1 <= step.count <= MAX_COUNT for step in steps)


def test_forward_moves_the_viewmat_back_by_the_reference_s_distance() -> None:
    viewmats = relative_viewmats(poses(parse("w*19")))
    assert viewmats.shape == (20, 4, 4)
    np.testing.assert_allclose(viewmats[-1, :3, 3], [0, 0, -1.52], atol=1e-6)


@pytest.mark.parametrize(
    ("key", "axis", "sign"),
    [("w", 2, 1), ("s", 2, -1), ("d", 0, 1), ("a", 0, -1), ("dn", 1, 1), ("u", 1, -1)],
)
def test_keys_move_along_opencv_axes(key: str, axis: int, sign: int) -> None:
    expected = np.zeros(3)
    expected[axis] = sign * 0.08
    np.testing.assert_allclose(poses(parse(key))[1, :3, 3], expected, atol=1e-15)


@pytest.mark.parametrize(("key", "axis", "sign"), [("l", 0, 1), ("j", 0, -1), ("k", 1, 1), ("i", 1, -1)])
def test_keys_turn_the_view_towards_their_side(key: str, axis: int, sign: int) -> None:
    forward = poses(parse(key))[1, :3, 2]
    assert forward[axis] == pytest.approx(sign * math.sin(math.radians(3)))


@given(steps_of_any_keys, st.floats(0.01, 2), st.floats(0.1, 30))
def test_poses_follow_the_reference_s_rule(steps: list[Step], distance: float, degrees: float) -> None:
    path = poses(steps, distance, degrees)
    np.testing.assert_array_equal(path[0], np.eye(4))
    np.testing.assert_allclose(path, straightforward_poses(steps, distance, degrees), atol=1e-12)
    require_rigid(path)


@given(
    steps_of_any_keys,
    st.floats(0.01, 2),
    st.floats(0.1, 30),
    st.lists(st.floats(-3, 3), min_size=6, max_size=6),
)
def test_a_trajectory_is_read_back_from_its_viewmats_wherever_it_starts(
    steps: list[Step], distance: float, degrees: float, start: list[float]
) -> None:
    path = poses(steps, distance, degrees)
    viewmats = relative_viewmats(se3_exp(np.array(start)) @ path).astype(np.float64)
    np.testing.assert_allclose(invert(viewmats), path, atol=1e-4)


def test_opposite_keys_cancel() -> None:
    np.testing.assert_array_equal(motion(["w", "s", "l", "j", "d"]), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(motion([]), np.zeros(5))


def test_an_unknown_key_has_no_motion() -> None:
    with pytest.raises(TrajectoryError, match="unknown key 'space'"):
        motion(["w", "space"])
