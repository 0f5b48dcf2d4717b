from dataclasses import replace

import numpy as np
import pytest

from minwm.errors import DataError
from minwm.evaluation.walks import HELD_CHUNKS, SCRIPT, along_clip, by_keys, script
from minwm.geometry.actions import from_keys
from minwm.models.worlds import World

from .conftest import MakeClip

pytestmark = pytest.mark.unit


def test_a_scripted_walk_goes_as_live_control_does(world: World, make_clip: MakeClip) -> None:
    clip = make_clip(0)
    walk = by_keys(world, clip, [("w",), ("l",)])
    assert np.array_equal(walk.given, clip.latents[:2]) and np.array_equal(walk.poses[:2], clip.poses[:2])
    assert len(walk.poses) == len(walk.actions) == 2 + 2 * 2
    steps = np.linalg.inv(walk.poses[1:-1]) @ walk.poses[2:]
    assert steps[0][:3, 3] == pytest.approx([0, 0, 4.0 * 4 / 17.5]), "forward at the world's pace"
    yaw = np.degrees(np.arctan2(steps[2:, 0, 2], steps[2:, 2, 2]))
    assert yaw == pytest.approx([70 * 4 / 17.5] * 2), "turning right at the world's rate"
    assert walk.actions[2:].tolist() == [from_keys(["w"])] * 2 + [from_keys(["l"])] * 2


def test_a_script_holds_every_control_once_in_a_cycle() -> None:
    held = script(2 * len(SCRIPT) * HELD_CHUNKS, 1, "a")
    for cycle in (held[: len(held) // 2], held[len(held) // 2 :]):
        assert sorted(cycle[::HELD_CHUNKS]) == sorted(SCRIPT)
        assert all(cycle[place] == cycle[place - place % HELD_CHUNKS] for place in range(len(cycle)))


def test_scripts_differ_by_key_and_a_shorter_one_is_the_longer_ones_beginning() -> None:
    assert script(40, 1, "a") == script(40, 1, "a") == script(70, 1, "a")[:40]
    assert script(40, 1, "a") != script(40, 1, "b")


def test_clips_that_do_not_fit_are_refused(world: World, make_clip: MakeClip) -> None:
    with pytest.raises(DataError, match="has 12 latent frames, the rollout needs 14"):
        along_clip(world, make_clip(0), 6)
    narrow = replace(make_clip(0), latents=make_clip(0).latents[..., :5])
    for make in (lambda: along_clip(world, narrow, 1), lambda: by_keys(world, narrow, [("w",)])):
        with pytest.raises(DataError, match=r"latents are \(16, 4, 5\), tiny expects \(16, 4, 6\)"):
            make()
