"""Key/value cache of a causal rollout: a ring of latent frames beside a fixed sink.

Keys arrive rotated at absolute positions and in the world's frame, so nothing is touched again when
older frames leave. Where a frame lies is a Python integer computed from its index: no shifting, no
copies, no reading back from a device. Knows nothing about cameras, sessions or scheduling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minwm.models.context import History, attention


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """Shape of one stream's cache; `heads` counts both branches, RoPE and PRoPE."""

    layers: int
    heads: int
    head_dim: int
    tokens_per_frame: int
    history: History

    @property
    def frames(self) -> int:
        """Latent frames that fit: sink and window."""
        return self.history.sink + self.history.window

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory of one stream, keys and values."""
        per_frame = 2 * self.layers * self.heads * self.head_dim * self.tokens_per_frame
        return per_frame * self.frames * dtype.itemsize


class KVCache:
    """Keys and values of `batch` streams that advance together."""

    def __init__(
        self, geometry: CacheGeometry, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry = geometry
        tokens = geometry.frames * geometry.tokens_per_frame
        shape = (geometry.layers, 2, batch, geometry.heads, tokens, geometry.head_dim)
        self._store = torch.zeros(shape, dtype=dtype, device=device)

    def context(self, start: int, frames: int) -> "Cached":
        """The context of a pass over frames [start, start + frames), which it writes into the cache.

        The frames must follow, or repeat, the last ones written: passes go forward chunk by chunk.
        """
        return Cached(self, start, frames)

    def update(self, layer: int, start: int, frames: int, kv: Tensor) -> Tensor:
        """Write keys and values (2, b, h, n, d) of frames [start, start + frames); all that they may see.

        Where a gradient has to flow through the new entries, the stored ones are copied, not changed.
        """
        stored = self._store[layer]
        if kv.requires_grad:
            stored = stored.clone()
        n = self.geometry.tokens_per_frame
        kv = kv.to(stored.dtype)
        for first, count, slot in self._runs(start, frames):
            stored[..., slot * n : (slot + count) * n, :] = kv[..., first * n : (first + count) * n, :]
        used = min(start + frames, self.geometry.frames)
        return stored[..., : used * n, :]

    def _runs(self, start: int, frames: int) -> list[tuple[int, int, int]]:
        """(offset in the pass, frames, slot) of every contiguous piece that the frames occupy."""
        runs: list[tuple[int, int, int]] = []
        for offset in range(frames):
            slot = self._slot(start + offset)
            if runs and runs[-1][2] + runs[-1][1] == slot:
                first, count, place = runs[-1]
                runs[-1] = (first, count + 1, place)
            else:
                runs.append((offset, 1, slot))
        return runs

    def _slot(self, frame: int) -> int:
        sink, window = self.geometry.history.sink, self.geometry.history.window
        return frame if frame < sink else sink + (frame - sink) % window


@dataclass(frozen=True)
class Cached:
    """A pass over frames [start, start + frames) that sees the cache's past and itself."""

    cache: KVCache
    start: int
    frames: int

    @property
    def positions(self) -> Sequence[int]:
        return range(self.start, self.start + self.frames)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = torch.stack([k, v]).transpose(2, 3)
        keys, values = self.cache.update(layer, self.start, self.frames, kv).unbind(0)
        return attention(q, keys.transpose(1, 2).to(q.dtype), values.transpose(1, 2).to(q.dtype))
