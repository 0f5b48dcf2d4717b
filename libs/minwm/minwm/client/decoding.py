"""Bytes from the wire to frames (t, y, x, 3): the other end of the service's encoders, one per session."""

import io
from collections.abc import Sequence
from typing import Any, Protocol

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minwm.client.v1 import session_pb2 as pb
from minwm.errors import SessionError


class FrameDecoder(Protocol):
    """Decodes one session's frames in order."""

    def decode(self, pieces: Sequence[bytes]) -> NDArray[np.uint8]:
        """Frames (t, y, x, 3), one for each piece. Raises SessionError when there are more or fewer."""
        ...


class H264Decoder:
    """Annex-B access units, each of which gives its frame at once."""

    def __init__(self) -> None:
        codec: Any = av.CodecContext.create("h264", "r")
        codec.thread_count = 1  # with frame threads, frames would come late
        self._codec = codec

    def decode(self, pieces: Sequence[bytes]) -> NDArray[np.uint8]:
        """One frame per access unit."""
        try:
            frames = [
                frame.to_ndarray(format="rgb24") for piece in pieces for frame in self._codec.decode(av.Packet(piece))
            ]
        except av.FFmpegError as error:
            raise SessionError(f"a chunk cannot be decoded as H.264 ({error})") from error
        if len(frames) != len(pieces):
            raise SessionError(f"a chunk of {len(pieces)} H.264 access units gave {len(frames)} frames")
        return np.stack(frames)


class JpegDecoder:
    """A JPEG file per frame."""

    def decode(self, pieces: Sequence[bytes]) -> NDArray[np.uint8]:
        """One frame per file."""
        try:
            return np.stack([np.asarray(Image.open(io.BytesIO(piece)).convert("RGB")) for piece in pieces])
        except OSError as error:
            raise SessionError(f"a chunk cannot be decoded as JPEG ({error})") from error


class RawDecoder:
    """The bytes themselves."""

    def __init__(self, height: int, width: int) -> None:
        self._shape = (height, width, 3)

    def decode(self, pieces: Sequence[bytes]) -> NDArray[np.uint8]:
        """Height × width × 3 bytes per frame."""
        try:
            return np.stack([np.frombuffer(piece, np.uint8).reshape(self._shape) for piece in pieces])
        except ValueError as error:
            raise SessionError(f"a raw frame does not have the shape {self._shape} ({error})") from error


def make_decoder(encoding: pb.Encoding, *, height: int, width: int) -> FrameDecoder:
    """A fresh decoder for one session. Raises SessionError for an encoding that this client does not know."""
    if encoding == pb.ENCODING_H264:
        return H264Decoder()
    if encoding == pb.ENCODING_JPEG:
        return JpegDecoder()
    if encoding == pb.ENCODING_RAW:
        return RawDecoder(height, width)
    raise SessionError(f"the server chose encoding {encoding}, which this client does not know")
