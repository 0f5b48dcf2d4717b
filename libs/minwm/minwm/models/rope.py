"""Rotary positions over (frame, row, column).

Each axis takes its share of a head's channels and has its own frequency table theta^(−2i/d_axis).
Neighbouring channels form a complex pair. Angles are computed in float64 from the absolute frame index,
so any index is exact; no table limits a stream's length.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Axes = tuple[int, int, int]
"""Channels of a head for the frame, the row and the column; even numbers."""


@lru_cache(maxsize=16)  # all passes over one chunk, and over one clip length, ask for the same
def rotation(
    frames: Sequence[int], rows: int, columns: int, axes: Axes, device: torch.device, *, theta: float = 10000.0
) -> Tensor:
    """Cosine and sine of every token's channel pairs: (len(frames)·rows·columns, sum(axes)/2, 2) float32.

    frames: hashable, such as a range or a tuple
    """
    with torch.inference_mode(False):  # whoever asks first, all may use it
        f, y, x = (
            _angles(positions, width, theta)
            for positions, width in zip((frames, range(rows), range(columns)), axes, strict=True)
        )
        grid = (len(f), rows, columns)
        axis_angles = f[:, None, None], y[None, :, None], x[None, None, :]
        angles = torch.cat([axis.expand(*grid, -1) for axis in axis_angles], dim=-1).flatten(0, 2)
        return torch.stack([angles.cos(), angles.sin()], dim=-1).to(device=device, dtype=torch.float32)


def rotations(
    streams: Sequence[Sequence[int]],
    rows: int,
    columns: int,
    axes: Axes,
    device: torch.device,
    *,
    theta: float = 10000.0,
) -> Tensor:
    """`rotation` of one stream for all, or of every stream: (b, n, sum(axes)/2, 2)."""
    each = [rotation(frames, rows, columns, axes, device, theta=theta) for frames in streams]
    return each[0] if len(each) == 1 else torch.stack(each)


def _angles(positions: Sequence[int], width: int, theta: float) -> Tensor:
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    return torch.tensor(list(positions), dtype=torch.float64)[:, None] * theta**-exponent


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate tokens x (b, n, h, d), float32 or better, by cosines and sines (n, d/2, 2) or (b, n, d/2, 2)."""
    pairs, turns = x.unflatten(-1, (-1, 2)), rotation[..., None, :, :]
    if not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(turns)
        return torch.view_as_real(turned).flatten(-2)
    (a, b), (cosine, sine) = pairs.unbind(-1), turns.unbind(-1)  # compilers fuse real numbers, and no complex ones
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-2)
