"""Start pictures: what a new session looks at first."""

import numpy as np
import pytest

from minwm.data.clips import Clip, frames_to_mp4
from minwm_pipelines.assembly import start_picture

pytestmark = pytest.mark.unit


def test_the_start_picture_is_the_frame_with_most_detail() -> None:
    random = np.random.default_rng(0)
    wall = np.full((16, 32, 48, 3), 90, np.uint8)
    wall[8] = random.integers(0, 256, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    clip = Clip(
        name="a",
        episode="a",
        split="heldout",
        caption="",
        latents=random.normal(size=(4, 16, 4, 6)).astype(np.float16),
        poses=np.tile(np.eye(4), (4, 1, 1)),
        intrinsics=np.array([0.5, 0.75, 0.5, 0.5], np.float32),
        actions=np.zeros(4, np.int64),
        frames=frames_to_mp4(wall, 17.5),
        notes={},
    )
    assert np.array_equal(start_picture(clip), clip.video()[8])
