"""Rigid poses and intrinsics.

Poses are (..., 4, 4) float64 in OpenCV axes (x right, y down, z forward): `c2w` maps camera to world,
a viewmat (w2c) is its inverse. Intrinsics are (4,) float32 fx fy cx cy, normalised by image size.
"""

import math

import numpy as np
from numpy.typing import NDArray

from minwm.errors import ConfigError, DataError

_RIGID_TOLERANCE = 1e-4  # poses read from float32 files are off by about 1e-6
_SMALL_ANGLE = 1e-3  # below, the series is exact to the last bit and the closed form divides by too little


def invert(pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of rigid poses (..., 4, 4)."""
    back = pose[..., :3, :3].swapaxes(-1, -2)
    inverse = np.zeros_like(pose)
    inverse[..., :3, :3] = back
    inverse[..., :3, 3:] = -back @ pose[..., :3, 3:]
    inverse[..., 3, 3] = 1.0
    return inverse


def require_rigid(c2w: NDArray[np.float64]) -> None:
    """Raise DataError, naming the first bad frame, unless `c2w` is (f, 4, 4), f > 0, with finite and rigid poses."""
    if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or len(c2w) == 0:
        raise DataError(f"poses have shape {c2w.shape}, expected (frames, 4, 4) with at least one frame")
    finite = np.isfinite(c2w).all(axis=(1, 2))
    if not finite.all():
        frame = int(np.argmin(finite))
        raise DataError(f"the pose of frame {frame} is not finite: {c2w[frame].tolist()}")
    rotation = c2w[:, :3, :3]
    with np.errstate(over="ignore", invalid="ignore"):  # huge numbers are not rigid either
        skewed = np.abs(rotation.swapaxes(1, 2) @ rotation - np.eye(3)).max(axis=(1, 2))
        foreign = np.abs(c2w[:, 3] - (0.0, 0.0, 0.0, 1.0)).max(axis=1)
        rigid = (skewed < _RIGID_TOLERANCE) & (foreign < _RIGID_TOLERANCE) & (np.linalg.det(rotation) > 0)
    if not rigid.all():
        frame = int(np.argmin(rigid))
        raise DataError(
            f"the pose of frame {frame} is not rigid: {c2w[frame].tolist()}, "
            "expected a rotation, a translation and the last row 0 0 0 1"
        )


def require_intrinsics(intrinsics: NDArray[np.floating]) -> None:
    """Raise DataError, naming the first bad number, unless `intrinsics` is (..., 4), finite, with fx and fy above 0."""
    if intrinsics.shape[-1:] != (4,):
        raise DataError(f"intrinsics have shape {intrinsics.shape}, expected (..., 4): fx fy cx cy")
    valid = np.isfinite(intrinsics)
    valid[..., :2] &= intrinsics[..., :2] > 0
    if not valid.all():
        *camera, column = np.argwhere(~valid)[0].tolist()
        name, positive = ("fx", "fy", "cx", "cy")[column], " above 0" if column < 2 else ""
        value = intrinsics[*camera, column]
        raise DataError(f"intrinsics{camera or ''}: {name}={value}, expected a finite number{positive}")


def relative_viewmats(c2w: NDArray[np.float64]) -> NDArray[np.float32]:
    """Viewmats (f, 4, 4) of the cameras `c2w` (f, 4, 4) in the world of the first one, whose own is the identity.

    Raises DataError naming the first frame whose pose is not finite or not rigid.
    """
    require_rigid(c2w)
    viewmats = invert(c2w) @ c2w[0]
    # Subtracting before rotating keeps small motions exact far from the world's origin.
    viewmats[:, :3, 3:] = c2w[:, :3, :3].swapaxes(1, 2) @ (c2w[0, :3, 3:] - c2w[:, :3, 3:])
    viewmats[0] = np.eye(4)
    return np.asarray(viewmats, np.float32)


def se3_exp(twist: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rigid motion (4, 4) after unit time at a constant body twist (6,): velocity x y z, radians about x y z."""
    x, y, z = twist[3:]
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    square = cross @ cross
    angle = float(np.linalg.norm(twist[3:]))
    # R = I + a K + b K², V = I + b K + c K² (Rodrigues, and its integral over the unit of time)
    a = np.sinc(angle / np.pi)
    b = 0.5 * np.sinc(angle / (2 * np.pi)) ** 2
    c = (angle - math.sin(angle)) / angle**3 if angle > _SMALL_ANGLE else 1 / 6 - angle**2 / 120 + angle**4 / 5040
    motion = np.eye(4)
    motion[:3, :3] += a * cross + b * square
    motion[:3, 3] = (np.eye(3) + b * cross + c * square) @ twist[:3]
    return motion


def intrinsics_for_fov(
    horizontal_degrees: float, height: int, width: int, *, pixel_height: float = 1.0
) -> NDArray[np.float32]:
    """fx fy cx cy (4,) of a centred camera; `pixel_height` is that of a pixel whose width is 1.

    Raises ConfigError for an impossible angle or size.
    """
    if not 0 < horizontal_degrees < 180:
        raise ConfigError(f"horizontal_degrees={horizontal_degrees}: expected an angle between 0 and 180")
    if height < 1 or width < 1:
        raise ConfigError(f"height={height}, width={width}: expected a picture of at least one pixel")
    fx = 0.5 / math.tan(math.radians(horizontal_degrees) / 2)
    return np.array([fx, fx * pixel_height * width / height, 0.5, 0.5], np.float32)


def crop_intrinsics(
    intrinsics: NDArray[np.float32], size: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int]
) -> NDArray[np.float32]:
    """Intrinsics (4,) of the piece `crop` (y, x) of a picture `size` (y, x), its first pixel at `corner` (y, x)."""
    (height, width), (top, left), (rows, columns) = size, corner, crop
    fx, fy, cx, cy = intrinsics.tolist()
    cropped = [fx * width / columns, fy * height / rows, (cx * width - left) / columns, (cy * height - top) / rows]
    return np.array(cropped, np.float32)


def rotation_angle(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """The angles (...) in degrees, 0 to 180, by which rotation matrices (..., 3, 3) turn."""
    skew = rotation - rotation.swapaxes(-1, -2)
    sine = 0.5 * np.sqrt(skew[..., 2, 1] ** 2 + skew[..., 0, 2] ** 2 + skew[..., 1, 0] ** 2)
    cosine = 0.5 * (np.trace(rotation, axis1=-2, axis2=-1) - 1)
    return np.asarray(np.degrees(np.arctan2(sine, cosine)))  # arccos of the trace alone loses small angles
