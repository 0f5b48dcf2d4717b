"""The first message of a stream, checked: `Open` to what the engine needs to open a session."""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from minwm.client.v1 import session_pb2 as pb
from minwm.streaming import StreamSpec
from minwm_session.encoding import choose_encoding
from minwm_session.errors import ProtocolError, UnknownModelError

MAX_IMAGE_PIXELS = 4096 * 4096


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a client asked for. `start` is an image (y, x, 3) of the model's size, a start image's name, or nothing."""

    prompt: str
    seed: int
    start: NDArray[np.uint8] | str | None
    encoding: pb.Encoding
    credits: int


def read_opening(event: pb.ClientEvent, spec: StreamSpec) -> Opening:
    """The opening in a stream's first event.

    Raises ProtocolError naming the field that makes no sense, UnknownModelError for a model that is not `spec`'s.
    """
    kind = event.WhichOneof("event")
    if kind != "open":
        raise ProtocolError("event", f"the first message is {kind or 'empty'}, expected open")
    if event.open.model not in ("", spec.model):
        raise UnknownModelError(f"open.model: no model {event.open.model!r} here, expected {spec.model!r}")
    raw_bytes = spec.frames_per_chunk * spec.height * spec.width * 3
    return Opening(
        prompt=event.open.prompt,
        seed=event.open.seed,
        start=_start(event.open, spec),
        encoding=choose_encoding(event.open.encodings, raw_bytes=raw_bytes),
        credits=event.open.credits,
    )


def _start(opening: pb.Open, spec: StreamSpec) -> NDArray[np.uint8] | str | None:
    kind = opening.WhichOneof("start")
    if kind == "start_image":
        return _read_image(opening.start_image, spec)
    if kind == "start_name":
        if opening.start_name not in spec.start_images:
            known = ", ".join(spec.start_images) or "none: the model has no start images"
            raise ProtocolError("open.start_name", f"no start image {opening.start_name!r}, expected one of {known}")
        return opening.start_name
    return None


def _read_image(data: bytes, spec: StreamSpec) -> NDArray[np.uint8]:
    """The picture, cropped to the model's proportions and scaled to its size."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                size = f"{image.width}x{image.height}"
                raise ProtocolError("open.start_image", f"{size} is too large, expected at most 4096x4096 pixels")
            fitted = ImageOps.fit(image.convert("RGB"), (spec.width, spec.height), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ProtocolError("open.start_image", f"{len(data)} bytes are no PNG or JPEG picture ({error})") from error
    return np.asarray(fitted, np.uint8)
