"""Pressed keys drawn on frames: a W A S D pad for moving and an I J K L pad for looking."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# key: column and row, in key widths from the pad's lower left corner
_MOVE_PAD = {"w": (1, 1), "a": (0, 0), "s": (1, 0), "d": (2, 0), "u": (0, 1), "dn": (2, 1)}
_LOOK_PAD = {"i": (1, 1), "j": (0, 0), "k": (1, 0), "l": (2, 0)}
_HIDDEN_UNLESS_HELD = {"u", "dn"}  # rarely used; without them the pad looks like a keyboard
_IDLE_FILL, _HELD_FILL = (0, 0, 0, 96), (255, 205, 64, 235)
_IDLE_INK, _HELD_INK = (255, 255, 255, 170), (20, 20, 20, 255)


def draw_keys(frame: NDArray[np.uint8], keys: Collection[str], *, height: int = 480) -> NDArray[np.uint8]:
    """The frame (y, x, 3), enlarged by the whole factor nearest to `height`, with the held keys lit up."""
    factor = max(1, round(height / frame.shape[0]))
    size = (frame.shape[1] * factor, frame.shape[0] * factor)
    picture = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    key_size = size[1] // 11
    margin = key_size // 2
    for pad, left in ((_MOVE_PAD, margin), (_LOOK_PAD, size[0] - margin - 3 * key_size)):
        for key, (column, row) in pad.items():
            if key not in _HIDDEN_UNLESS_HELD or key in keys:
                corner = (left + column * key_size, size[1] - margin - (row + 1) * key_size)
                _draw_key(draw, key, corner, key_size, held=key in keys)
    return np.asarray(Image.alpha_composite(picture, layer).convert("RGB"))


def _draw_key(draw: ImageDraw.ImageDraw, key: str, corner: tuple[int, int], size: int, *, held: bool) -> None:
    x, y = corner
    gap = max(1, size // 14)
    box = (x + gap, y + gap, x + size - gap, y + size - gap)
    ink = _HELD_INK if held else _IDLE_INK
    draw.rounded_rectangle(box, radius=size // 5, fill=_HELD_FILL if held else _IDLE_FILL, outline=ink, width=gap)
    font = ImageFont.load_default(size=size // 2)
    draw.text((x + size / 2, y + size / 2), key.upper(), fill=ink, font=font, anchor="mm")
