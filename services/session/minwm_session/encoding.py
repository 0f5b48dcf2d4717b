"""Frames (t, y, x, 3) to bytes for the wire, one piece per frame, without delay.

An H.264 encoder belongs to one session: its first frame is an IDR frame and later ones refer to it.
"""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Protocol

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minwm.client.v1 import session_pb2 as pb
from minwm_session.errors import ProtocolError

_H264_OPTIONS = {"preset": "ultrafast", "tune": "zerolatency", "crf": "20", "x264-params": "keyint=infinite:scenecut=0"}
_BT601 = 6  # what the RGB conversion below computes; untagged, players guess by the picture's size
_LIMITED_RANGE = 1
_MAX_RAW_BYTES = 4 * 1000**2  # a message's default limit in gRPC clients is 4 MiB


class FrameEncoder(Protocol):
    """Encodes one session's frames in order."""

    def encode(self, frames: NDArray[np.uint8]) -> list[bytes]:
        """One piece of bytes for each of the frames (t, y, x, 3)."""
        ...


class H264Encoder:
    """Annex-B access units, 4:2:0. The sides must be even."""

    def __init__(self, height: int, width: int, fps: float) -> None:
        codec: Any = av.CodecContext.create("libx264", "w")
        codec.height, codec.width, codec.pix_fmt = height, width, "yuv420p"
        codec.framerate = Fraction(fps).limit_denominator(1000)
        codec.time_base = 1 / codec.framerate
        codec.options = dict(_H264_OPTIONS)
        codec.thread_count = 1
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT601
        codec.color_range = _LIMITED_RANGE
        self._codec = codec
        self._count = 0

    def encode(self, frames: NDArray[np.uint8]) -> list[bytes]:
        """One access unit per frame."""
        pieces = []
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = self._count
            self._count += 1
            pieces.append(b"".join(bytes(packet) for packet in self._codec.encode(picture)))
        return pieces


class JpegEncoder:
    """A JPEG file per frame, 4:4:4."""

    def encode(self, frames: NDArray[np.uint8]) -> list[bytes]:
        """One file per frame."""
        return [self._encode_one(frame) for frame in frames]

    def _encode_one(self, frame: NDArray[np.uint8]) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=90, subsampling=0)
        return buffer.getvalue()


class RawEncoder:
    """The bytes themselves."""

    def encode(self, frames: NDArray[np.uint8]) -> list[bytes]:
        """Height × width × 3 bytes per frame."""
        return [frame.tobytes() for frame in frames]


def choose_encoding(accepted: Sequence[int], *, raw_bytes: int) -> pb.Encoding:
    """The first of the client's encodings that we can send; H.264 when it names none.

    `raw_bytes` is the size of a chunk's frames. Raises ProtocolError when we can send none of them.
    """
    sendable = [pb.ENCODING_H264, pb.ENCODING_JPEG]
    if raw_bytes < _MAX_RAW_BYTES:
        sendable.append(pb.ENCODING_RAW)
    for wanted in accepted or [pb.ENCODING_H264]:
        for encoding in sendable:
            if encoding == wanted:
                return encoding
    names = ", ".join(pb.Encoding.Name(encoding) for encoding in sendable)
    raise ProtocolError("open.encodings", f"{list(accepted)} has nothing we can send, expected one of {names}")


def make_encoder(encoding: pb.Encoding, *, height: int, width: int, fps: float) -> FrameEncoder:
    """A fresh encoder for one session."""
    if encoding == pb.ENCODING_H264:
        return H264Encoder(height, width, fps)
    return JpegEncoder() if encoding == pb.ENCODING_JPEG else RawEncoder()
