import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.evaluation.controllability import compose, direction_shares, motion_errors
from minwm.evaluation.judge import true_motions
from minwm.geometry.live import CameraVelocity, advance

pytestmark = pytest.mark.unit


def _walk(random: np.random.Generator, frames: int) -> NDArray[np.float64]:
    """Poses of a level camera that goes, turns and climbs at random."""
    poses = [np.eye(4)]
    for _ in range(frames - 1):
        forward, right, up, yaw = random.normal(0, (3, 3, 1, 60)).tolist()
        poses.append(advance(poses[-1], CameraVelocity(forward=forward, right=right, up=up, yaw=yaw), 0.2))
    return np.stack(poses)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_motions_of_parts_compose_to_the_motion_of_the_whole(seed: int, groups: int, size: int) -> None:
    poses = _walk(np.random.default_rng(seed), groups * size + 1)
    assert compose(true_motions(poses), size) == pytest.approx(true_motions(poses[::size]), abs=1e-9)


def test_a_rest_that_fills_no_group_is_left_out() -> None:
    assert compose(np.ones((5, 4)), 2).shape == (2, 4)


def _motion(right: float = 0, forward: float = 0, yaw: float = 0) -> list[float]:
    return [right, forward, 0.0, yaw]


def test_directions_are_right_when_they_are_the_commanded_ones() -> None:
    commanded = np.array([_motion(forward=1), _motion(forward=-1), _motion(right=1), _motion(right=-1), _motion(yaw=9)])
    shares = direction_shares(commanded, commanded, chunk=1, pace=1.0)
    counted = {name: (share.right, share.chunks) for name, share in shares.items()}
    assert counted == {
        "turn": (1, 1),
        "move": (4, 4),
        "turn left": (0, 0),
        "turn right": (1, 1),
        "forward": (1, 1),
        "back": (1, 1),
        "strafe left": (1, 1),
        "strafe right": (1, 1),
    }
    assert shares["turn left"].value is None and shares["turn right"].value == 1.0


def test_left_for_right_and_standing_still_are_wrong() -> None:
    commanded = np.array([_motion(yaw=9), _motion(yaw=-9), _motion(right=1), _motion(forward=1), _motion(forward=1)])
    seen = np.array([_motion(yaw=-1), _motion(), _motion(right=-1), _motion(), _motion(forward=0.01)])
    shares = direction_shares(seen, commanded, chunk=1, pace=1.0)
    assert (shares["turn"].right, shares["turn"].chunks) == (0, 2)
    assert (shares["move"].right, shares["move"].chunks) == (1, 3), "only the last went forward, however little"
    assert (shares["strafe right"].right, shares["forward"].right) == (0, 1)


def test_a_move_may_be_off_by_less_than_45_degrees() -> None:
    angles = np.radians([44, 46, -44, -46, 180])
    seen = np.array([_motion(right=np.sin(a), forward=np.cos(a)) for a in angles])
    commanded = np.array([_motion(forward=1)] * len(angles))
    assert direction_shares(seen, commanded, chunk=1, pace=1.0)["move"].right == 2


def test_small_commands_do_not_count_and_chunks_are_judged_as_wholes() -> None:
    commanded = np.array([_motion(yaw=0.9), _motion(yaw=0.9), _motion(yaw=3), _motion(yaw=-0.5, forward=0.3)])
    seen = np.array([_motion(yaw=-5)] * 2 + [_motion(yaw=-1, forward=1), _motion(yaw=2)])
    shares = direction_shares(seen, commanded, chunk=2, pace=1.0)
    assert (shares["turn"].right, shares["turn"].chunks) == (1, 1)  # 2.5° commanded, 1° seen over the second chunk
    assert shares["move"].chunks == 0  # 0.3 of a chunk's 2, less than a quarter


def test_a_guess_is_right_as_often_as_chance_has_it() -> None:
    random = np.random.default_rng(0)
    seen, commanded = (random.normal(0, (1, 1, 0, 20), (20_000, 4)) for _ in range(2))
    shares = direction_shares(seen, commanded, chunk=1, pace=0.1)
    assert shares["turn"].value == pytest.approx(0.5, abs=0.02)
    assert shares["move"].value == pytest.approx(0.25, abs=0.02)


def test_errors_equal_their_definition() -> None:
    random = np.random.default_rng(1)
    seen, true = random.normal(size=(7, 4)), random.normal(size=(7, 4))
    errors = motion_errors(seen, true)
    turn = sum(abs(a[3] - b[3]) for a, b in zip(seen, true, strict=True)) / 7
    move = sum(np.hypot(a[0] - b[0], a[1] - b[1]) for a, b in zip(seen, true, strict=True)) / 7
    assert errors.rotation_error_deg == pytest.approx(turn)
    assert errors.translation_error == pytest.approx(move)
    assert errors.relative_rotation_error == pytest.approx(turn / np.abs(true[:, 3]).mean())
    assert errors.relative_translation_error == pytest.approx(move / np.hypot(true[:, 0], true[:, 1]).mean())
    still = motion_errors(seen, np.zeros_like(true))
    assert still.relative_rotation_error is still.relative_translation_error is None, "relative to nothing"
