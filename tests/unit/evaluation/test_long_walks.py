from pathlib import Path

import numpy as np
import pytest

from minwm.data.video import decode_video
from minwm.evaluation.controllability import direction_shares, walking_pace
from minwm.evaluation.drift import MEASURES, RealRange, appearance
from minwm.evaluation.judge import load_judge, true_motions
from minwm.evaluation.long_walks import follow, measure
from minwm.evaluation.rollouts import roll_out
from minwm.evaluation.walks import along_clip, by_keys, script
from minwm.models.worlds import World

from .conftest import MakeClip, Odometer, painted

pytestmark = pytest.mark.unit


def test_what_is_seen_in_a_section_is_compared_with_what_was_commanded_in_it(world: World, make_clip: MakeClip) -> None:
    walk = by_keys(world, make_clip(0), script(10, 0, "a"))
    frames = painted(range(1, len(walk.poses)))  # from the last given latent frame on
    for first, end in ((0, 3), (4, 10)):
        seen, told = follow(Odometer(walk.poses), frames, walk.poses, 2, first, end)
        assert len(seen) == 2 * (end - first)
        assert seen == pytest.approx(told), f"chunks {first} to {end}"


def test_a_walk_is_measured_against_real_frames_and_its_commands(
    world: World, make_clip: MakeClip, judge_folder: Path, tmp_path: Path
) -> None:
    starts, done = [make_clip(0), make_clip(1)], list[int]()
    real = appearance(np.concatenate([clip.video() for clip in starts]))
    seer = load_judge(judge_folder)
    found = measure(world, starts, 3.0, 5, seer, real, tmp_path, lambda count, note="": done.append(count))
    assert done == list(range(1, 15)), "3 s are 7 chunks, twice"
    assert (found["clips"], found["scripted"], found["seconds"]) == (2, 2, 3.0)
    assert found["true_directions"] == {}, "nobody saw where the keys lead"
    assert found["sections"] == {"first": (0.0, 3.0), "last": (0.0, 3.0)}
    walks = [by_keys(world, clip, script(7, 5, clip.name)) for clip in starts]
    looks = [appearance(roll_out(world, walk, seed=5)[:52]) for walk in walks]
    inside = [RealRange.of(real).inside(look) for look in looks]
    assert found["in_range"]["all"] == found["in_range"]["last"] == pytest.approx(np.mean(inside))
    for column, name in enumerate(MEASURES):
        assert found["per_second"][name][0] == pytest.approx(np.mean([look[:18, column] for look in looks]))
        assert found["range"][name] == pytest.approx(np.percentile(real[:, column], (1, 99)))
    assert found["directions"]["first"]["move"]["chunks"] > 0
    for video in found["videos"]:
        assert len(decode_video((tmp_path / video["video"]).read_bytes(), where="walk")) == 7 * 8


def test_a_clip_that_lasts_as_long_is_followed_along_its_own_path_beside_its_true_frames(
    world: World, make_clip: MakeClip, judge_folder: Path, tmp_path: Path
) -> None:
    lasting, short = make_clip(0, latent_frames=16), make_clip(1, latent_frames=15)
    walk = along_clip(world, lasting, 7)
    real = appearance(lasting.video())
    seer = load_judge(judge_folder)
    found = measure(world, [lasting], 3.0, 5, seer, real, tmp_path, lambda count, note="": None)
    assert found["scripted"] == 0
    seen = direction_shares(
        seer.motions(lasting.video()[4:]), true_motions(walk.poses[1:]), chunk=2, pace=walking_pace(world.card)
    )
    assert found["true_directions"]["last"] == {name: share.to_json() for name, share in seen.items()}
    look = appearance(roll_out(world, walk, seed=5)[:52])
    assert found["in_range"]["all"] == pytest.approx(RealRange.of(real).inside(look).mean())
    (video,) = found["videos"]
    shown = decode_video((tmp_path / video["video"]).read_bytes(), where="walk")
    assert shown.shape[0] == 16 * 4 and shown.shape[2] > 2 * 48, "the game beside it, the given frames first"
    both = measure(world, [lasting, short], 3.0, 5, None, real, tmp_path, lambda count, note="": None)
    assert (both["clips"], both["scripted"]) == (2, 1)


def test_directions_need_somebody_to_see_them(world: World, make_clip: MakeClip, tmp_path: Path) -> None:
    real = appearance(make_clip(0).video())
    found = measure(world, [make_clip(0)], 0.4, 0, None, real, tmp_path, lambda count, note="": None)
    assert found["directions"] == {}
