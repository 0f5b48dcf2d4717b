"""Start pictures: what a new session looks at first."""

import numpy as np
import pytest

from minwm.data.clips import Clip, frames_to_mp4
from minwm_pipelines.assembly import start_picture

pytestmark = pytest.mark.unit


def test_the_start_picture_is_the_one_from_where_the_player_came_furthest_ahead() -> None:
    random = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (6, 1, 1))
    # Forward (z) one step, then two back, then three forward: the last stretch begins at frame 3.
    poses[:, 2, 3] = [0, 1, 0, -1, 1, 2]
    # Sideways motion is no room ahead.
    poses[1, 0, 3] = 50
    clip = Clip(
        name="a",
        episode="a",
        split="heldout",
        caption="",
        latents=random.normal(size=(6, 16, 4, 6)).astype(np.float16),
        poses=poses,
        intrinsics=np.array([0.5, 0.75, 0.5, 0.5], np.float32),
        actions=np.zeros(6, np.int64),
        frames=frames_to_mp4(random.integers(0, 256, (24, 32, 48, 3), np.uint8), 17.5),
        notes={},
    )
    assert np.array_equal(start_picture(clip), clip.video()[3 * 4 + 3])
