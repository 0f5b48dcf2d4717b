"""RGB frames to video bytes and back, through PyAV."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from minwm.errors import DataError


def encode_video(frames: NDArray[np.uint8], fps: float, *, lossless: bool = False, crf: int = 18) -> bytes:
    """Frames (t, y, x, 3) as a Matroska (lossless RGB) or MP4 (H.264, `crf`) file."""
    buffer = io.BytesIO()
    codec, pixels = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
    options = {"preset": "veryfast", "crf": "0" if lossless else str(crf)}
    with av.open(buffer, "w", format="matroska" if lossless else "mp4") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_video(data: bytes, *, where: str, expect: int | None = None) -> NDArray[np.uint8]:
    """All frames (t, y, x, 3) of a video file.

    Raises DataError, naming `where`, when it is not a video or holds other than `expect` frames.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{where}: the video cannot be decoded ({error})") from error
    if not frames or (expect is not None and len(frames) != expect):
        raise DataError(f"{where}: the video has {len(frames)} frames, expected {expect or 'at least one'}")
    return np.stack(frames).astype(np.uint8, copy=False)
