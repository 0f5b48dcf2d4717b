"""What a person looks at: videos side by side, strips of pictures, and a long walk with its keys drawn on it."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minwm.client.overlay import draw_keys
from minwm.data.video import encode_video
from minwm.evaluation.rollouts import Comparison

_GAP = 4  # pixels between pictures, even for the video codec
_STRIP = 8  # pictures in a strip's row
_SHOWN_HEIGHT = 288  # pixels, of a walk with keys: they must be read


def side_by_side(comparison: Comparison, shown: Sequence[str], fps: float) -> bytes:
    """An MP4, true on the left, then what is named; the given frames come first, on all sides."""
    columns = [comparison.true, *(comparison.others[name] for name in shown)]
    panels = [np.concatenate([comparison.given, frames]) for frames in columns]
    gap = np.zeros((*panels[0].shape[:2], _GAP, 3), np.uint8)
    spaced = [piece for panel in panels for piece in (gap, panel)][1:]
    return encode_video(np.concatenate(spaced, axis=2), fps)


def strip(comparison: Comparison, shown: Sequence[str]) -> bytes:
    """A PNG: the last given frame, then frames at even distances; true above, below it what is named."""
    chosen = np.linspace(0, len(comparison.true), _STRIP).round().astype(int)
    rows = []
    for frames in (comparison.true, *(comparison.others[name] for name in shown)):
        row = np.concatenate([comparison.given[-1:], frames])[chosen]
        bordered = np.pad(row, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=255)
        rows.append(np.concatenate(list(bordered), axis=1))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)[:-_GAP, :-_GAP]).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(comparison: Comparison, shown: Sequence[str], folder: Path, fps: float) -> dict[str, str]:
    """Write the clip's video and strip; their names in `folder`."""
    names = {"video": f"{comparison.clip}.mp4", "strip": f"{comparison.clip}.png"}
    (folder / names["video"]).write_bytes(side_by_side(comparison, shown, fps))
    (folder / names["strip"]).write_bytes(strip(comparison, shown))
    return names


def keyed_video(frames: NDArray[np.uint8], keys: Sequence[Sequence[str]], fps: float) -> bytes:
    """An MP4 of frames (t, y, x, 3), the keys of each of its equally long pieces lit up while they are held."""
    per_piece = len(frames) // len(keys)
    drawn = [draw_keys(frame, keys[place // per_piece], height=_SHOWN_HEIGHT) for place, frame in enumerate(frames)]
    return encode_video(np.stack(drawn), fps)
