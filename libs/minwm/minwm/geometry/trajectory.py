"""Trajectories written as text: `w*8,l*4`, compound keys `w+l*4`, a count of 1 where none is given.

One step is one latent frame. w s a d move forward, back, left, right; u dn move up, down; j l turn left,
right; i k look up, down. Reads text and makes poses of fixed steps; live control is `live`'s.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minwm.errors import TrajectoryError
from minwm.geometry.camera import se3_exp

# key: its motion along right, down, forward, and about yaw (to the right), pitch (up)
_MOTIONS: dict[str, tuple[int, int, int, int, int]] = {
    "w": (0, 0, 1, 0, 0),
    "s": (0, 0, -1, 0, 0),
    "a": (-1, 0, 0, 0, 0),
    "d": (1, 0, 0, 0, 0),
    "u": (0, -1, 0, 0, 0),
    "dn": (0, 1, 0, 0, 0),
    "j": (0, 0, 0, -1, 0),
    "l": (0, 0, 0, 1, 0),
    "i": (0, 0, 0, 0, 1),
    "k": (0, 0, 0, 0, -1),
}
KEYS = tuple(_MOTIONS)
MAX_COUNT = 10_000  # of one token; a typing slip must not ask for gigabytes of poses


@dataclass(frozen=True)
class Step:
    """Keys held together for `count` latent frames."""

    keys: frozenset[str]
    count: int = 1


def motion(keys: Iterable[str]) -> NDArray[np.int64]:
    """The net motion (5,) of held keys, each -1, 0 or 1: right, down, forward, yaw right, pitch up.

    Opposite keys cancel. Raises TrajectoryError for an unknown key.
    """
    held = frozenset(keys)
    if unknown := sorted(held - _MOTIONS.keys()):
        raise TrajectoryError(f"unknown key {unknown[0]!r}, expected keys of {' '.join(KEYS)}")
    net = np.zeros(5, np.int64)
    for key in held:
        net += _MOTIONS[key]
    return net


def parse(text: str) -> tuple[Step, ...]:
    """The steps that a text such as `w*8,w+l*4` says.

    Raises TrajectoryError naming the token, its position (from 1) and what was expected.
    """
    if not text.strip():
        raise TrajectoryError(
            f"the trajectory is empty, expected steps such as w*8,w+l*4 with keys of {' '.join(KEYS)}"
        )
    return tuple(_parse_token(token.strip(), place) for place, token in enumerate(text.split(","), start=1))


def _parse_token(token: str, place: int) -> Step:
    where = f"trajectory step {place} ({token!r})"
    names, star, count = token.partition("*")
    keys = [name.strip() for name in names.split("+")]
    for key in keys:
        if key not in _MOTIONS:
            raise TrajectoryError(f"{where}: unknown key {key!r}, expected keys of {' '.join(KEYS)}, as in w+l*4")
    if not star:
        return Step(frozenset(keys))
    if not re.fullmatch(r" *[1-9][0-9]{0,4}", count) or int(count) > MAX_COUNT:
        raise TrajectoryError(f"{where}: bad count {count!r}, expected 1 to {MAX_COUNT} after keys of {' '.join(KEYS)}")
    return Step(frozenset(keys), int(count))


def poses(steps: Sequence[Step], distance: float = 0.08, degrees: float = 3.0) -> NDArray[np.float64]:
    """Camera-to-world poses (1 + n, 4, 4) of n latent frames in all; the first is the identity.

    Each frame R <- R·Ry(yaw), R <- R·Rx(pitch), t += R·[right, down, forward]: `distance` in world units
    along each axis that a key moves, so a diagonal is longer, and `degrees` about each that it turns.
    """
    path = [np.eye(4)]
    for step in steps:
        right, down, forward, yaw, pitch = motion(step.keys).astype(np.float64)
        turned = se3_exp(np.array([0, 0, 0, 0, np.radians(degrees * yaw), 0]))
        tilted = se3_exp(np.array([0, 0, 0, np.radians(degrees * pitch), 0, 0]))
        moved = se3_exp(distance * np.array([right, down, forward, 0, 0, 0]))
        for _ in range(step.count):
            path.append(path[-1] @ turned @ tilted @ moved)
    return np.stack(path)
