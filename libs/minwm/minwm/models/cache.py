"""Key/value cache of a causal rollout: a ring of latent frames beside a fixed sink.

Keys arrive rotated at absolute positions and in the world's frame, so nothing is touched again when
older frames leave. Where a frame lies is a Python integer computed from its index: no shifting, no
copies, no reading back from a device. Knows nothing about cameras, sessions or scheduling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minwm.errors import InputError
from minwm.models.context import Beside, History, attention


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """Shape of one stream's cache; `heads` counts both branches, RoPE and PRoPE.

    beside: room for a prompt's keys, in tokens, where the backbone keeps them beside the frames'
    """

    layers: int
    heads: int
    head_dim: int
    tokens_per_frame: int
    history: History
    beside: int = 0

    @property
    def tokens(self) -> int:
        """Keys of one layer and head: the prompt's and the frames'."""
        return self.beside + self.frames * self.tokens_per_frame

    @property
    def frames(self) -> int:
        """Latent frames that fit: sink and window."""
        return self.history.sink + self.history.window

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory of one stream, keys and values."""
        return 2 * self.layers * self.heads * self.head_dim * self.tokens * dtype.itemsize


class KVCache:
    """Keys and values of `batch` streams that advance together."""

    def __init__(
        self, geometry: CacheGeometry, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry = geometry
        shape = (geometry.layers, 2, batch, geometry.heads, geometry.tokens, geometry.head_dim)
        self._store = torch.zeros(shape, dtype=dtype, device=device)
        self._lent = False
        self._beside: list[Beside | None] = [None] * geometry.layers
        self._end = 0

    def context(self, start: int, frames: int) -> "Cached":
        """The context of a pass over frames [start, start + frames), which it writes into the cache.

        Passes go forward chunk by chunk: raises InputError for frames that leave a gap after the last ones written,
        or do not fit into the window.
        """
        if not 0 <= start <= self._end or frames > self.geometry.history.window:
            raise InputError(
                f"frames {start} to {start + frames - 1}: expected at most {self.geometry.history.window} frames "
                f"from {self._end} or earlier"
            )
        return Cached(self, start, frames, self._store)

    def update(
        self,
        layer: int,
        start: int,
        frames: int,
        kv: Tensor,
        beside: Beside | None = None,
        *,
        gradient: bool = False,
        past: Tensor | None = None,
    ) -> Tensor:
        """Write keys and values (2, b, h, n, d) of frames [start, start + frames); all that they may see.

        What is beside the frames comes first, and is written only when it is not what was there. Where a gradient has
        to flow through the new entries, or `gradient` says that one flows past them, the stored ones are copied, not
        changed, and such a pass may be made again later: it finds in `past`, the store when its context was made, the
        frames that it saw, for the first frame to take an older one's place goes into a new store. Raises InputError
        for keys of another shape than the cache's.
        """
        n, room = self.geometry.tokens_per_frame, self.geometry.beside
        expected = (*self._store.shape[1:4], frames * n, self._store.shape[-1])
        if kv.shape != expected:
            raise InputError(f"keys and values have shape {tuple(kv.shape)}, expected {expected} as the cache")
        beside_grad = beside is not None and beside.keys.requires_grad
        grad = torch.is_grad_enabled() and (gradient or kv.requires_grad or beside_grad)
        if grad:
            stored = (self._store if past is None else past)[layer].clone()
            self._lent = True
        else:
            if self._lent and start + frames > self.geometry.frames:
                self._store, self._lent = self._store.clone(), False
            stored = self._store[layer]
        self._end = max(self._end, start + frames)
        kv = kv.to(stored.dtype)
        for first, count, slot in self._runs(start, frames):
            stored[..., room + slot * n : room + (slot + count) * n, :] = kv[..., first * n : (first + count) * n, :]
        length = 0
        if beside is not None:
            length = beside.keys.shape[1]
            if grad or beside is not self._beside[layer]:
                stored[..., room - length : room, :] = self._laid_out(beside)
                if not grad:
                    self._beside[layer] = beside
        used = min(start + frames, self.geometry.frames)
        return stored[..., room - length : room + used * n, :]

    def _laid_out(self, beside: Beside) -> Tensor:
        """(2, b, h, l, d)."""
        if beside.keys.shape[1] > self.geometry.beside:
            raise InputError(
                f"prompt: has {beside.keys.shape[1]} tokens, expected at most the cache's {self.geometry.beside}"
            )
        return torch.stack(beside.repeated(self.geometry.heads)).transpose(2, 3).to(self._store.dtype)

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
    """A pass over frames [start, start + frames) that sees the cache's past and itself.

    past: what the cache stored when the pass was made, for when it is made again to compute its gradient
    """

    cache: KVCache
    start: int
    frames: int
    past: Tensor | None = None
    bidirectional = False

    @property
    def positions(self) -> Sequence[int]:
        return range(self.start, self.start + self.frames)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        kv = torch.stack([k, v]).transpose(2, 3)
        stored = self.cache.update(layer, self.start, self.frames, kv, beside, gradient=q.requires_grad, past=self.past)
        seen = stored.to(q.dtype)
        keys, values = seen.transpose(2, 3).unbind(0)
        mask = None if beside is None else beside.key_mask(keys.shape[1] - beside.keys.shape[1])
        return attention(q, keys, values, mask)
