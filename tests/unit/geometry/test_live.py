"""Live control: velocities of keys and mouse, and exact poses from them."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.errors import ConfigError, TrajectoryError
from minwm.geometry.camera import require_rigid
from minwm.geometry.live import CameraVelocity, Speeds, advance, velocity_from_keys
from minwm.geometry.trajectory import KEYS, parse, poses

pytestmark = pytest.mark.unit

SPEEDS = Speeds(move=4.7, turn=70.0)
START = poses(parse("w+d*7,l*13,i*4,u*2"))[-1]

moves = st.floats(-20, 20)
turns = st.floats(-360, 360)
velocities = st.builds(CameraVelocity, forward=moves, right=moves, up=moves, yaw=turns, pitch=turns)
key_sets = st.frozensets(st.sampled_from(KEYS))


def on_helix(forward: float, up: float, yaw: float, seconds: float) -> NDArray[np.float64]:
    """The closed form: a circle whose centre is to the right, walked along its tangent, while rising at `up`."""
    angle, radius = math.radians(yaw) * seconds, forward / math.radians(yaw)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array(
        [
            [cos, 0, sin, radius * (1 - cos)],
            [0, 1, 0, -up * seconds],
            [-sin, 0, cos, radius * sin],
            [0, 0, 0, 1],
        ]
    )


@given(st.floats(0.5, 10), moves, st.floats(5, 300), st.floats(0.01, 3), st.integers(1, 100))
def test_forward_yaw_and_up_climb_a_helix_in_any_number_of_steps(
    forward: float, up: float, yaw: float, seconds: float, steps: int
) -> None:
    pose = np.eye(4)
    for _ in range(steps):
        pose = advance(pose, CameraVelocity(forward=forward, up=up, yaw=yaw), seconds / steps)
    np.testing.assert_allclose(pose, on_helix(forward, up, yaw, seconds), atol=1e-9)


def test_an_hour_of_small_steps_stays_on_the_circle() -> None:
    pose = np.eye(4)
    for _ in range(63_000):
        pose = advance(pose, CameraVelocity(forward=4.7, yaw=71.3), 1 / 17.5)
    np.testing.assert_allclose(pose, on_helix(4.7, 0.0, 71.3, 3600.0), atol=1e-7)


@given(velocities, st.floats(0.01, 2), st.lists(st.floats(0.01, 1), min_size=1, max_size=20))
def test_an_interval_in_parts_ends_where_the_whole_does(
    velocity: CameraVelocity, seconds: float, weights: list[float]
) -> None:
    pose = START
    for weight in weights:
        pose = advance(pose, velocity, seconds * weight / sum(weights))
    np.testing.assert_allclose(pose, advance(START, velocity, seconds), atol=1e-10)
    require_rigid(pose[None])


@given(velocities, st.floats(0.01, 2))
def test_the_opposite_velocity_leads_back(velocity: CameraVelocity, seconds: float) -> None:
    opposite = CameraVelocity(**{name: -value for name, value in dataclasses.asdict(velocity).items()})
    np.testing.assert_allclose(advance(advance(START, velocity, seconds), opposite, seconds), START, atol=1e-10)


@given(velocities)
def test_a_pose_changes_at_the_stated_speeds(velocity: CameraVelocity) -> None:
    moment = 1e-5
    change = (advance(np.eye(4), velocity, moment) - advance(np.eye(4), velocity, -moment)) / (2 * moment)
    yaw, pitch = math.radians(velocity.yaw), math.radians(velocity.pitch)
    expected = np.zeros((4, 4))  # turned to the right, the view goes to +x; upwards, to -y
    expected[:3, 2], expected[2, :3] = (yaw, -pitch, 0), (-yaw, pitch, 0)
    expected[:3, 3] = velocity.right, -velocity.up, velocity.forward
    np.testing.assert_allclose(change, expected, atol=1e-6)


def test_pitch_up_raises_the_view() -> None:
    assert advance(np.eye(4), CameraVelocity(pitch=30.0), 1.0)[1, 2] == pytest.approx(-0.5)


@given(key_sets)
def test_keys_move_as_their_trajectory_step_does(keys: frozenset[str]) -> None:
    velocity = velocity_from_keys(keys, SPEEDS)
    written = poses(parse("+".join(keys or {"w", "s"})), distance=1e-6, degrees=1e-4)[1]
    live = advance(np.eye(4), velocity, 1e-6)
    np.testing.assert_array_equal(np.sign(np.round(live, 8)), np.sign(np.round(written, 8)))


@given(key_sets)
def test_every_direction_is_walked_at_the_same_speed(keys: frozenset[str]) -> None:
    velocity = velocity_from_keys(keys, SPEEDS)
    speed = math.hypot(velocity.forward, velocity.right, velocity.up)
    assert speed == 0 or speed == pytest.approx(SPEEDS.move)


@given(key_sets)
def test_a_key_and_its_opposite_change_nothing(keys: frozenset[str]) -> None:
    for pair in ({"w", "s"}, {"a", "d"}, {"u", "dn"}, {"j", "l"}, {"i", "k"}):
        assert velocity_from_keys(keys | pair, SPEEDS) == velocity_from_keys(keys - pair, SPEEDS)


def test_the_mouse_turns_the_view_after_it_and_adds_to_keys() -> None:
    velocity = velocity_from_keys(["l"], SPEEDS, mouse_dx=-30.0, mouse_dy=10.0)
    assert velocity == CameraVelocity(yaw=40.0, pitch=-10.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(TrajectoryError, match="yaw"):
        CameraVelocity(yaw=value)
    with pytest.raises(TrajectoryError, match="pitch"):
        velocity_from_keys([], SPEEDS, mouse_dy=value)
    with pytest.raises(TrajectoryError, match="seconds"):
        advance(START, CameraVelocity(), value)
    with pytest.raises(ConfigError, match="turn"):
        Speeds(move=1.0, turn=value)


def test_a_negative_speed_is_refused() -> None:
    with pytest.raises(ConfigError, match="move=-1"):
        Speeds(move=-1.0, turn=1.0)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(TrajectoryError, match="unknown key 'shift'"):
        velocity_from_keys(["w", "shift"], SPEEDS)
