"""A session's controls: ids that only grow, two tracks, the velocity they add up to.

`current` is immutable and replaced whole, so a chunk computed on another thread takes one consistent
snapshot by reading it once.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minwm.client.keys import LOOK_KEYS, MOVE_KEYS
from minwm.client.v1 import session_pb2 as pb
from minwm.geometry.live import CameraVelocity, Speeds, velocity_from_keys
from minwm_session.errors import ProtocolError


@dataclass(frozen=True, kw_only=True)
class ControlSnapshot:
    """The last control accepted (0: none) and the camera velocity that it leads to."""

    control_id: int
    velocity: CameraVelocity


class Controls:
    """What the client asks of the camera."""

    def __init__(self, speeds: Speeds) -> None:
        self.current = ControlSnapshot(control_id=0, velocity=CameraVelocity())
        self._speeds = speeds
        self._move, self._look = pb.Move(), pb.Look()
        self._accepted: deque[tuple[int, float]] = deque()

    def accept(self, control: pb.Control, now: float) -> pb.ControlAck.Status:
        """Apply a control that arrived at `now`; the latest wins on each track.

        Raises ProtocolError naming the field when it makes no sense; the controls then stay as they are.
        """
        if control.id == 0:
            raise ProtocolError("control.id", "0 is no id, expected 1 or more")
        if control.id <= self.current.control_id:
            again = control.id == self.current.control_id
            return pb.ControlAck.STATUS_DUPLICATE if again else pb.ControlAck.STATUS_STALE
        move = control.move if control.HasField("move") else self._move
        look = control.look if control.HasField("look") else self._look
        velocity = _velocity(move, look, self._speeds)
        self._move, self._look = move, look
        self._accepted.append((control.id, now))
        self.current = ControlSnapshot(control_id=control.id, velocity=velocity)
        return pb.ControlAck.STATUS_ACCEPTED

    def applied(self, control_id: int) -> list[float]:
        """When the controls up to `control_id` arrived that no chunk had applied before."""
        times = []
        while self._accepted and self._accepted[0][0] <= control_id:
            times.append(self._accepted.popleft()[1])
        return times


def _velocity(move: pb.Move, look: pb.Look, speeds: Speeds) -> CameraVelocity:
    _check_keys("control.move.keys", move.keys, MOVE_KEYS)
    _check_keys("control.look.keys", look.keys, LOOK_KEYS)
    for field, value in (
        ("control.move.forward", move.forward),
        ("control.move.right", move.right),
        ("control.move.up", move.up),
        ("control.look.yaw", look.yaw),
        ("control.look.pitch", look.pitch),
    ):
        if not math.isfinite(value):
            raise ProtocolError(field, f"{value} is no velocity, expected a finite number")
    held = velocity_from_keys([*move.keys, *look.keys], speeds)
    return replace(
        held,
        forward=held.forward + move.forward,
        right=held.right + move.right,
        up=held.up + move.up,
        yaw=held.yaw + look.yaw,
        pitch=held.pitch + look.pitch,
    )


def _check_keys(field: str, keys: Sequence[str], known: Sequence[str]) -> None:
    for key in keys:
        if key not in known:
            raise ProtocolError(field, f"unknown key {key!r}, expected some of {' '.join(known)}")
