"""Live control: held keys and mouse to a camera velocity, and a velocity to the camera's next pose.

A velocity is constant in the camera's own frame until the next control, so the pose follows exactly,
whatever the intervals it is integrated in. Knows no walls.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from minwm.errors import ConfigError, TrajectoryError
from minwm.geometry.camera import se3_exp
from minwm.geometry.trajectory import motion


@dataclass(frozen=True, kw_only=True)
class CameraVelocity:
    """In the camera's frame: world units/s forward, right and up; degrees/s, yaw to the right and pitch up positive.

    Raises TrajectoryError for a number that is not finite.
    """

    forward: float = 0.0
    right: float = 0.0
    up: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value):
                raise TrajectoryError(f"camera velocity: {field.name}={value}, expected a finite number")


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How fast held keys go: `move` in world units/s, `turn` in degrees/s about each axis."""

    move: float
    turn: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"speeds: {field.name}={value}, expected a finite number, at least 0")


def velocity_from_keys(
    keys: Iterable[str], speeds: Speeds, *, mouse_dx: float = 0.0, mouse_dy: float = 0.0
) -> CameraVelocity:
    """The velocity of held keys (those of `trajectory.KEYS`) and a mouse in screen directions.

    `mouse_dx` (to the right) and `mouse_dy` (downwards) are degrees/s, added to the keys' turning. Opposite
    keys cancel; moving along several axes is as fast as along one. Raises TrajectoryError for an unknown key.
    """
    right, down, forward, yaw, pitch = motion(keys).tolist()
    move = speeds.move / (math.hypot(right, down, forward) or 1.0)
    return CameraVelocity(
        forward=forward * move,
        right=right * move,
        up=-down * move,
        yaw=yaw * speeds.turn + mouse_dx,
        pitch=pitch * speeds.turn - mouse_dy,
    )


def advance(c2w: NDArray[np.float64], velocity: CameraVelocity, seconds: float) -> NDArray[np.float64]:
    """The pose (4, 4) after `seconds` at this velocity. Raises TrajectoryError when `seconds` is not finite."""
    if not math.isfinite(seconds):
        raise TrajectoryError(f"seconds={seconds}: expected a finite number")
    yaw, pitch = math.radians(velocity.yaw), math.radians(velocity.pitch)
    twist = np.array([velocity.right, -velocity.up, velocity.forward, pitch, yaw, 0.0])
    return c2w @ se3_exp(twist * seconds)
