"""Video files in memory."""

import numpy as np
import pytest

from minwm.data.video import decode_video, encode_video
from minwm.errors import DataError

pytestmark = pytest.mark.unit

FRAMES = np.random.default_rng(0).integers(0, 256, (10, 32, 48, 3), np.uint8)


def test_lossless_video_comes_back_bit_for_bit() -> None:
    data = encode_video(FRAMES, 17.5, lossless=True)
    np.testing.assert_array_equal(decode_video(data, where="here", expect=10), FRAMES)


def test_lossy_video_comes_back_close_and_complete() -> None:
    y, x = np.mgrid[0:32, 0:48]
    smooth = np.stack([np.stack([4 * y + t, 3 * x, 2 * y + x], -1) for t in range(12)]).astype(np.uint8)
    decoded = decode_video(encode_video(smooth, 17.5, crf=14), where="here", expect=12)
    assert np.abs(decoded.astype(int) - smooth).mean() < 3


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_truncated_video_is_refused(lossless: bool, keep: float) -> None:
    data = encode_video(FRAMES, 17.5, lossless=lossless)
    with pytest.raises(DataError, match="clip 7: the video"):
        decode_video(data[: int(keep * len(data))], where="clip 7", expect=10)


def test_video_with_another_number_of_frames_is_refused() -> None:
    data = encode_video(FRAMES, 17.5)
    with pytest.raises(DataError, match="clip 7: the video has 10 frames, expected 12"):
        decode_video(data, where="clip 7", expect=12)


def test_what_is_no_video_is_refused() -> None:
    with pytest.raises(DataError, match="clip 7: the video cannot be decoded"):
        decode_video(b"this is text, not a film", where="clip 7")
