"""Frames on the wire: what the service encodes, the client decodes, without delay and nearly without loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minwm.client.decoding import make_decoder
from minwm.client.v1 import session_pb2 as pb
from minwm.errors import SessionError
from minwm_session.encoding import choose_encoding, make_encoder
from minwm_session.errors import ProtocolError

pytestmark = pytest.mark.unit

HEIGHT, WIDTH, FRAMES_PER_CHUNK = 96, 128, 8


def walk(frames: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth random picture that slides past the camera, (t, y, x, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, : WIDTH + 4 * frames].astype(np.float64)
    waves = random.uniform(0.02, 0.12, (3, 6, 2)), random.uniform(0, 2 * np.pi, (3, 6))
    picture = np.stack(
        [sum(np.sin(a * x + b * y + p) for (a, b), p in zip(w, ps, strict=True)) for w, ps in zip(*waves, strict=True)],
        axis=-1,
    )
    scaled = (127.5 + 20 * picture).clip(0, 255).astype(np.uint8)
    return np.stack([scaled[:, 3 * t : 3 * t + WIDTH] for t in range(frames)])


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2).clip(1e-9)))


@pytest.mark.parametrize(
    ("encoding", "least"), [(pb.ENCODING_H264, 34.0), (pb.ENCODING_JPEG, 34.0), (pb.ENCODING_RAW, 99.0)]
)
def test_every_chunk_decodes_to_all_its_frames_as_soon_as_it_is_there(encoding: pb.Encoding, least: float) -> None:
    frames = walk(6 * FRAMES_PER_CHUNK)
    encoder = make_encoder(encoding, height=HEIGHT, width=WIDTH, fps=17.5)
    decoder = make_decoder(encoding, height=HEIGHT, width=WIDTH)
    for first in range(0, len(frames), FRAMES_PER_CHUNK):
        chunk = frames[first : first + FRAMES_PER_CHUNK]
        pieces = encoder.encode(chunk)
        assert len(pieces) == FRAMES_PER_CHUNK
        decoded = decoder.decode(pieces)
        assert decoded.shape == chunk.shape
        assert psnr(chunk, decoded) > least


@settings(max_examples=20, deadline=None)
@given(colour=st.tuples(*[st.integers(16, 240)] * 3))
def test_h264_keeps_colours(colour: tuple[int, int, int]) -> None:
    frames = np.full((2, 32, 32, 3), colour, np.uint8)
    pieces = make_encoder(pb.ENCODING_H264, height=32, width=32, fps=17.5).encode(frames)
    decoded = make_decoder(pb.ENCODING_H264, height=32, width=32).decode(pieces)
    assert np.abs(decoded.astype(int) - frames).max() <= 6


def nal_types(access_unit: bytes) -> list[int]:
    """The types of the NAL units in Annex-B bytes (ISO/IEC 14496-10, 7.3.1 and annex B)."""
    starts = [part for part in access_unit.split(b"\x00\x00\x01")[1:] if part]
    return [part[0] & 0x1F for part in starts]


def test_h264_starts_with_parameters_and_an_idr_frame_and_never_needs_another() -> None:
    encoder = make_encoder(pb.ENCODING_H264, height=HEIGHT, width=WIDTH, fps=17.5)
    units = [nal_types(piece) for piece in encoder.encode(walk(80))]
    assert {7, 8, 5} <= set(units[0])
    assert all(5 not in unit and 1 in unit for unit in units[1:])


def test_the_clients_first_sendable_encoding_wins() -> None:
    assert choose_encoding([], raw_bytes=100) == pb.ENCODING_H264
    assert choose_encoding([9, pb.ENCODING_JPEG, pb.ENCODING_H264], raw_bytes=100) == pb.ENCODING_JPEG
    assert choose_encoding([pb.ENCODING_RAW], raw_bytes=100) == pb.ENCODING_RAW


def test_raw_frames_that_would_not_fit_a_message_are_refused() -> None:
    with pytest.raises(ProtocolError, match=r"open\.encodings: \[3\] has nothing we can send"):
        choose_encoding([pb.ENCODING_RAW], raw_bytes=5_000_000)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (pb.ENCODING_H264, "H.264"),
        (pb.ENCODING_JPEG, "cannot be decoded as JPEG"),
        (pb.ENCODING_RAW, "does not have the shape"),
    ],
)
def test_damaged_pieces_are_an_error_that_says_so(encoding: pb.Encoding, message: str) -> None:
    decoder = make_decoder(encoding, height=HEIGHT, width=WIDTH)
    with pytest.raises(SessionError, match=message):
        decoder.decode([b"\x00\x00\x01\x65damaged", b"more"])
