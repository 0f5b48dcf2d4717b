"""The two tracks of a control, move and look, and which of the trajectory grammar's keys belong to each."""

from minwm.geometry.trajectory import KEYS, motion

LOOK_KEYS = tuple(key for key in KEYS if motion([key])[3:].any())
MOVE_KEYS = tuple(key for key in KEYS if key not in LOOK_KEYS)
