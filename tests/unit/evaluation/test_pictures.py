import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minwm.data.video import decode_video
from minwm.evaluation.pictures import keyed_video, side_by_side, strip, write_pictures
from minwm.evaluation.rollouts import Comparison

pytestmark = pytest.mark.unit


@pytest.fixture
def comparison() -> Comparison:
    random = np.random.default_rng(0)
    given, true, generated, taught = (random.integers(0, 256, (n, 16, 24, 3), np.uint8) for n in (8, 16, 16, 16))
    return Comparison(clip="a", given=given, true=true, others={"generated": generated, "teacher": taught})


def test_videos_show_true_and_other_frames_side_by_side(comparison: Comparison) -> None:
    video = decode_video(side_by_side(comparison, ("generated", "teacher"), 17.5), where="test", expect=24)
    assert video.shape == (24, 16, 24 + 4 + 24 + 4 + 24, 3)


def test_strips_show_true_above_generated(comparison: Comparison) -> None:
    picture = np.asarray(Image.open(io.BytesIO(strip(comparison, ("generated",)))))
    assert picture.shape == (16 + 4 + 16, 8 * 24 + 7 * 4, 3)
    assert np.array_equal(picture[:16, :24], comparison.given[-1])
    assert np.array_equal(picture[:16, -24:], comparison.true[-1])
    assert np.array_equal(picture[-16:, -24:], comparison.others["generated"][-1])


def test_pictures_are_named_after_their_clip(comparison: Comparison, tmp_path: Path) -> None:
    names = write_pictures(comparison, ("generated",), tmp_path, 17.5)
    assert names == {"video": "a.mp4", "strip": "a.png"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.png"]


def test_held_keys_are_lit_while_they_are_held() -> None:
    frames = np.full((16, 96, 128, 3), 40, np.uint8)
    video = decode_video(keyed_video(frames, [("w",), ("l",)], 17.5), where="test", expect=16).astype(int)
    assert video.shape == (16, 288, 384, 3)
    changed = np.abs(video[4] - video[12]).max(-1) > 60
    left, right = changed[:, :192].sum(), changed[:, 192:].sum()
    assert left > 100 and right > 100, "the key on the left goes out, the one on the right lights up"
    assert np.abs(video[8] - video[12]).max() < 60, "a piece shows one group of keys"
