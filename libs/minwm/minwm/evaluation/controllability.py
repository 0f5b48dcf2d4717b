"""Whether the world moves as it was told: motions seen in frames against those commanded.

Motions are (n, 4): right, forward, down (world units), yaw to the right (degrees), each in the axes of the earlier of
two cameras. They are seen by a MotionEstimator, whose own error on real frames belongs beside every figure here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.worlds import WorldCard

RIGHT, FORWARD, DOWN, YAW = range(4)
LEAST_TURN = 1.0  # degrees per latent frame from which a command counts as a turn
LEAST_MOVE_SHARE = 0.25  # of walking pace, from which it counts as a move
WITHIN = 45.0  # degrees that a seen move may be off the commanded one


@dataclass(frozen=True)
class Share:
    """How many of `chunks` commanded chunks went right."""

    right: int
    chunks: int

    @property
    def value(self) -> float | None:
        """The share; None where nothing was commanded."""
        return self.right / self.chunks if self.chunks else None

    def to_json(self) -> dict[str, float | int | None]:
        """As written to files."""
        return {"value": self.value, "chunks": self.chunks}


@dataclass(frozen=True, kw_only=True)
class MotionErrors:
    """Mean absolute errors per latent frame, and the same relative to the mean of what was true.

    The relative ones are None where nothing moved.
    """

    rotation_error_deg: float
    relative_rotation_error: float | None
    translation_error: float
    relative_translation_error: float | None

    def to_json(self) -> dict[str, float | None]:
        """As written to files."""
        return asdict(self)


def motion_errors(seen: NDArray[np.float64], true: NDArray[np.float64]) -> MotionErrors:
    """The errors of motions (n, 4); of translation those over the ground, in world units."""
    turn, turned = np.abs(seen[:, YAW] - true[:, YAW]).mean(), np.abs(true[:, YAW]).mean()
    over_ground = [RIGHT, FORWARD]
    move = np.linalg.norm(seen[:, over_ground] - true[:, over_ground], axis=1).mean()
    moved = np.linalg.norm(true[:, over_ground], axis=1).mean()
    return MotionErrors(
        rotation_error_deg=float(turn),
        relative_rotation_error=float(turn / turned) if turned else None,
        translation_error=float(move),
        relative_translation_error=float(move / moved) if moved else None,
    )


def walking_pace(card: WorldCard) -> float:
    """World units that a walking player goes in a latent frame."""
    return card.speeds.move * FRAMES_PER_LATENT / card.fps


def compose(motions: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The motion (n // size, 4) over each `size` consecutive ones, in the axes of the first camera; turns are yaw."""
    groups = motions[: len(motions) // size * size].reshape(-1, size, 4)
    total = np.zeros((len(groups), 4))
    for step in range(size):
        heading = np.radians(total[:, YAW])
        cos, sin = np.cos(heading), np.sin(heading)
        right, forward = groups[:, step, RIGHT], groups[:, step, FORWARD]
        total[:, RIGHT] += cos * right + sin * forward
        total[:, FORWARD] += cos * forward - sin * right
        total[:, DOWN] += groups[:, step, DOWN]
        total[:, YAW] += groups[:, step, YAW]
    return total


def direction_shares(
    seen: NDArray[np.float64], commanded: NDArray[np.float64], *, chunk: int, pace: float
) -> Mapping[str, Share]:
    """The shares of chunks that went the commanded way: `turn`, `move`, and each control by itself.

    Motions (n, 4) per latent frame, in whole chunks of `chunk` of them; `pace` is the way that walking takes in a
    latent frame. Where a chunk turns by LEAST_TURN or more, it is right when it is seen to turn to the same side; where
    it moves at LEAST_MOVE_SHARE of the pace or more, when it is seen to move less than WITHIN off, over the ground (one
    in four does by chance). A move counts for the control whose direction it is nearest to.
    """
    seen, commanded = compose(seen, chunk), compose(commanded, chunk)
    least_turn, least_move = LEAST_TURN * chunk, LEAST_MOVE_SHARE * pace * chunk
    turns = np.abs(commanded[:, YAW]) >= least_turn
    turned = np.sign(seen[:, YAW]) == np.sign(commanded[:, YAW])
    lengths = np.linalg.norm(commanded[:, [RIGHT, FORWARD]], axis=1)
    moves = (lengths >= least_move) & (lengths > 0)
    ahead, off = (np.arctan2(x[:, RIGHT], x[:, FORWARD]) for x in (commanded, seen))
    apart = np.abs((np.degrees(off - ahead) + 180) % 360 - 180)
    moved = (apart < WITHIN) & (np.linalg.norm(seen[:, [RIGHT, FORWARD]], axis=1) > 0)
    quarter = np.round(ahead / (np.pi / 2)).astype(int) % 4  # 0 forward, 1 right, 2 back, 3 left
    chosen = {"turn": (turns, turned), "move": (moves, moved)}
    for name, side in (("turn left", -1), ("turn right", 1)):
        chosen[name] = (turns & (np.sign(commanded[:, YAW]) == side), turned)
    for name, place in (("forward", 0), ("back", 2), ("strafe left", 3), ("strafe right", 1)):
        chosen[name] = (moves & (quarter == place), moved)
    return {name: Share(int((which & right).sum()), int(which.sum())) for name, (which, right) in chosen.items()}
