"""The 81 discrete actions: label = 9 · translation + rotation.

Translations 0-8: none, forward, back, left, right, forward+left, forward+right, back+left, back+right.
Rotations 0-8: none, yaw right, yaw left, pitch up, pitch down, and yaw with pitch in the same order.
Up and down have no label. Labels of held keys and labels read off poses agree, but for a step that turns so far
that its move leaves its keys' sector: over 27° of live control or 13° of a written trajectory (7° and 3.7° with
up or down held). The weights that HY-WorldPlay and minWM published count right as 3, left as 4: `swap_sides`.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from minwm.errors import TrajectoryError
from minwm.geometry.camera import require_rigid
from minwm.geometry.trajectory import motion

CLASSES = 81

_TRANSLATIONS = (
    "",
    "forward",
    "back",
    "left",
    "right",
    "forward + left",
    "forward + right",
    "back + left",
    "back + right",
)
_ROTATIONS = (
    "",
    "yaw right",
    "yaw left",
    "pitch up",
    "pitch down",
    "yaw right + pitch up",
    "yaw right + pitch down",
    "yaw left + pitch up",
    "yaw left + pitch down",
)
# [sign on the first axis, sign on the second], each 0, 1 or -1: -1 indexes the last row or column
_CLASS_OF_SIGNS = np.array([[0, 3, 4], [1, 5, 6], [2, 7, 8]], np.int64)
_OTHER_SIDE = np.array([0, 1, 2, 4, 3, 6, 5, 8, 7], np.int64)


def from_keys(keys: Iterable[str]) -> int:
    """The label of keys held together; opposite keys cancel. Raises TrajectoryError for an unknown key."""
    right, _, forward, yaw, pitch = motion(keys)
    return int(_label(forward, -right, yaw, pitch))


def from_poses(
    c2w: NDArray[np.float64],
    *,
    min_distance: float = 0.01,
    direction_degrees: float = 60.0,
    min_degrees: float = 0.05,
) -> NDArray[np.int64]:
    """The labels (f,) of the motion from each pose of `c2w` (f, 4, 4) to the next; the first is 0.

    A move counts when longer than `min_distance` world units, along each axis that it is less than
    `direction_degrees` from; a turn counts, about each axis, when more than `min_degrees`. Roll never does.
    The defaults are those HY-WorldPlay's and minWM's weights were trained with. Raises DataError for bad poses.
    """
    require_rigid(c2w)
    back = c2w[:-1, :3, :3].swapaxes(1, 2)
    move = (back @ (c2w[1:, :3, 3:] - c2w[:-1, :3, 3:]))[..., 0]
    turn = back @ c2w[1:, :3, :3]
    length = np.linalg.norm(move, axis=1, keepdims=True)
    along = np.sign(move) * (np.abs(move) > length * np.cos(np.radians(direction_degrees))) * (length > min_distance)
    # Euler angles about the fixed axes x y z, which are the pitch and yaw of R = Ry(yaw)·Rx(pitch)
    yaw = np.degrees(np.arcsin(np.clip(-turn[:, 2, 0], -1, 1)))
    pitch = np.degrees(np.arctan2(turn[:, 2, 1], turn[:, 2, 2]))
    about = [np.sign(angle) * (np.abs(angle) > min_degrees) for angle in (yaw, pitch)]
    signs = [axis.astype(np.int64) for axis in (along[:, 2], -along[:, 0], *about)]
    return np.concatenate([np.zeros(1, np.int64), _label(*signs)])


def swap_sides(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The labels (...) with moves to the left and to the right exchanged, turns kept; twice is the identity.

    Takes our labels to those that HY-WorldPlay's and minWM's published weights were trained on, and back.
    Raises TrajectoryError outside 0 to 80.
    """
    _require_labels(labels)
    translation, rotation = np.divmod(labels, 9)
    return np.asarray(9 * _OTHER_SIDE[translation] + rotation)


def describe(label: int) -> str:
    """The label in words: `forward + left, yaw right`, or `still`. Raises TrajectoryError outside 0 to 80."""
    _require_labels(np.array(label))
    translation, rotation = divmod(label, 9)
    return ", ".join(filter(None, (_TRANSLATIONS[translation], _ROTATIONS[rotation]))) or "still"


def _label(
    forward: NDArray[np.int64], left: NDArray[np.int64], yaw: NDArray[np.int64], pitch: NDArray[np.int64]
) -> NDArray[np.int64]:
    return np.asarray(9 * _CLASS_OF_SIGNS[forward, left] + _CLASS_OF_SIGNS[yaw, pitch])


def _require_labels(labels: NDArray[np.int64]) -> None:
    foreign = labels[(labels < 0) | (labels >= CLASSES)]
    if foreign.size:
        raise TrajectoryError(f"action label {foreign[0]}: expected 0 to {CLASSES - 1}")
