"""Poses and intrinsics, against float64 references that share no formula with the code."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.errors import ConfigError, DataError
from minwm.geometry.camera import (
    intrinsics_for_fov,
    invert,
    relative_viewmats,
    require_intrinsics,
    require_rigid,
    rotation_angle,
    se3_exp,
)

pytestmark = pytest.mark.unit

seeds = st.integers(0, 2**32 - 1)


def random_poses(seed: int, count: int, reach: float = 5.0) -> NDArray[np.float64]:
    """Rigid poses from QR decompositions."""
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.standard_normal((count, 3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))[:, None, None]
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = rotation
    poses[:, :3, 3] = reach * random.standard_normal((count, 3))
    return poses


def brute_force_exp(twist: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix exponential: its power series on a 2^-20 part, squared twenty times."""
    x, y, z = twist[3:]
    generator = np.zeros((4, 4))
    generator[:3, :3] = [[0, -z, y], [z, 0, -x], [-y, x, 0]]
    generator[:3, 3] = twist[:3]
    part, term = np.eye(4), np.eye(4)
    for order in range(1, 8):
        term = term @ generator / 2**20 / order
        part = part + term
    return np.linalg.matrix_power(part, 2**20)


@given(seeds)
def test_invert_equals_the_general_matrix_inverse(seed: int) -> None:
    poses = random_poses(seed, 6).reshape(2, 3, 4, 4)
    np.testing.assert_allclose(invert(poses), np.linalg.inv(poses), atol=1e-12)


@given(seeds)
def test_poses_compose_and_invert_back(seed: int) -> None:
    first, second = random_poses(seed, 8).reshape(2, 4, 4, 4)
    np.testing.assert_allclose(invert(invert(first)), first, atol=1e-12)
    np.testing.assert_allclose(first @ invert(first), np.tile(np.eye(4), (4, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(first @ (invert(first) @ second), second, atol=1e-12)
    np.testing.assert_allclose(invert(first @ second), invert(second) @ invert(first), atol=1e-12)


@given(seeds)
def test_poses_are_read_back_from_relative_viewmats(seed: int) -> None:
    poses = random_poses(seed, 6)
    viewmats = relative_viewmats(poses).astype(np.float64)
    np.testing.assert_allclose(poses[0] @ invert(viewmats), poses, atol=1e-5)


@given(seeds)
def test_relative_viewmats_are_world_to_camera_from_the_first_camera(seed: int) -> None:
    poses = random_poses(seed, 5)
    viewmats = relative_viewmats(poses)
    expected = np.linalg.inv(np.linalg.inv(poses[0]) @ poses)
    assert viewmats.dtype == np.float32
    np.testing.assert_array_equal(viewmats[0], np.eye(4))
    np.testing.assert_allclose(viewmats, expected, atol=1e-5)


@given(seeds)
def test_relative_viewmats_do_not_depend_on_the_world(seed: int) -> None:
    poses, world = random_poses(seed, 5), random_poses(seed + 1, 1, reach=100.0)
    np.testing.assert_allclose(relative_viewmats(world @ poses), relative_viewmats(poses), atol=1e-5)


def test_relative_viewmats_keep_small_motions_far_from_the_origin() -> None:
    poses = random_poses(0, 1, reach=1e7).repeat(2, axis=0)
    poses[1, :3, 3] += 0.25 * poses[1, :3, 2]  # forward
    np.testing.assert_allclose(relative_viewmats(poses)[1, :3, 3], [0, 0, -0.25], atol=1e-8)


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ((0, 3), math.nan, "not finite"),
        ((1, 1), math.inf, "not finite"),
        ((0, 0), 2.0, "not rigid"),
        ((0, 0), 1e200, "not rigid"),
        ((3, 0), 0.1, "not rigid"),
    ],
)
def test_a_bad_pose_is_refused_by_its_frame(place: tuple[int, int], value: float, complaint: str) -> None:
    poses = random_poses(3, 6)
    poses[4][place] = value
    with pytest.raises(DataError, match=f"frame 4 is {complaint}"):
        relative_viewmats(poses)


def test_a_mirrored_pose_is_refused() -> None:
    poses = random_poses(3, 3)
    poses[2, :3, 0] *= -1
    with pytest.raises(DataError, match="frame 2 is not rigid"):
        require_rigid(poses)


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 4), (2, 3, 4)])
def test_poses_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected \(frames, 4, 4\)"):
        require_rigid(np.zeros(shape))


@given(seeds, st.integers(0, 5), st.integers(0, 3), st.integers(0, 3), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(
    seed: int, frame: int, row: int, column: int, value: float
) -> None:
    poses = random_poses(seed, 6)
    poses[frame, row, column] = value
    with pytest.raises(DataError, match=f"frame {frame} is not finite"):
        require_rigid(poses)


@given(seeds, st.floats(-12, 0.5))
def test_exponential_equals_the_power_series_at_every_size(seed: int, magnitude: float) -> None:
    twist = np.random.default_rng(seed).standard_normal(6)
    twist[3:] *= 10**magnitude
    np.testing.assert_allclose(se3_exp(twist), brute_force_exp(twist), rtol=0, atol=1e-9)


def test_exponential_is_continuous_where_the_series_takes_over() -> None:
    direction = np.array([0.3, -1.0, 0.7, 0.48, 0.6, 0.64])
    below, above = direction.copy(), direction.copy()
    below[3:] *= 1e-3 * (1 - 1e-9)
    above[3:] *= 1e-3 * (1 + 1e-9)
    np.testing.assert_allclose(se3_exp(above), se3_exp(below), rtol=0, atol=1e-11)


@given(seeds)
def test_the_opposite_exponential_is_the_inverse(seed: int) -> None:
    twist = np.random.default_rng(seed).standard_normal(6)
    np.testing.assert_allclose(se3_exp(-twist), invert(se3_exp(twist)), atol=1e-12)


def test_exponential_of_nothing_is_the_identity() -> None:
    np.testing.assert_array_equal(se3_exp(np.zeros(6)), np.eye(4))


@given(seeds, st.floats(1e-7, 179.999))
def test_rotation_angle_reads_back_the_angle_turned(seed: int, degrees: float) -> None:
    axis = np.random.default_rng(seed).standard_normal(3)
    twist = np.concatenate([np.zeros(3), math.radians(degrees) * axis / np.linalg.norm(axis)])
    rotation = np.stack([np.eye(3), se3_exp(twist)[:3, :3]])
    np.testing.assert_allclose(rotation_angle(rotation), [0, degrees], rtol=1e-6, atol=1e-12)


@given(st.floats(5, 170), st.integers(1, 2000), st.integers(1, 2000))
def test_the_picture_s_edge_is_seen_at_half_the_field_of_view(degrees: float, height: int, width: int) -> None:
    fx, fy, cx, cy = intrinsics_for_fov(degrees, height, width).tolist()
    edge = math.degrees(math.atan2(1 - cx, fx))
    assert edge == pytest.approx(degrees / 2, rel=1e-5)
    assert fx * width == pytest.approx(fy * height, rel=1e-5), "pixels are square"
    assert (cx, cy) == (0.5, 0.5)


@pytest.mark.parametrize("degrees", [0.0, 180.0, -90.0, math.nan])
def test_an_impossible_field_of_view_is_refused(degrees: float) -> None:
    with pytest.raises(ConfigError, match="horizontal_degrees"):
        intrinsics_for_fov(degrees, 96, 128)


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(ConfigError, match="height=0"):
        intrinsics_for_fov(90.0, 0, 128)


@given(st.floats(5, 170), st.integers(1, 2000), st.integers(1, 2000))
def test_intrinsics_of_any_camera_are_accepted(degrees: float, height: int, width: int) -> None:
    one = intrinsics_for_fov(degrees, height, width)
    require_intrinsics(one)
    require_intrinsics(np.tile(one, (2, 3, 1)).astype(np.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["fx", "fy", "cx", "cy"])
def test_intrinsics_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    intrinsics = np.array([0.5, 0.9, 0.5, 0.5], np.float32)
    intrinsics[["fx", "fy", "cx", "cy"].index(name)] = value
    with pytest.raises(DataError, match=rf"^intrinsics: {name}={value}, expected a finite number"):
        require_intrinsics(intrinsics)


@given(st.integers(0, 2), st.integers(0, 1), st.floats(-1e3, 0))
def test_a_focal_length_that_is_not_positive_is_refused_by_its_camera(camera: int, axis: int, focal: float) -> None:
    intrinsics = np.random.default_rng(camera).uniform(0.4, 0.9, (2, 3, 4))
    intrinsics[1, camera, axis] = focal
    with pytest.raises(DataError) as refused:
        require_intrinsics(intrinsics)
    assert str(refused.value) == (f"intrinsics[1, {camera}]: f{'xy'[axis]}={focal}, expected a finite number above 0")


@pytest.mark.parametrize("shape", [(), (3,), (5,), (4, 3), (3, 3)])
def test_intrinsics_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected \(\.\.\., 4\): fx fy cx cy"):
        require_intrinsics(np.ones(shape))
