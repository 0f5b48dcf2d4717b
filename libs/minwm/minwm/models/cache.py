"""Key/value cache of a causal rollout: a ring of latent frames beside a fixed sink.

Keys of the window arrive rotated at absolute positions and in the world's frame, so nothing is touched again when
older frames leave. A sink's keys and values are also kept raw, and placed afresh for every chunk (`place_sinks`), so
that it stays near and nothing accumulates error. Where a frame lies is a Python integer computed from its index: no
shifting, no copies, no reading back from a device. Knows nothing about sessions or scheduling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minwm.errors import InputError
from minwm.models.context import Beside, History, attention
from minwm.models.prope import invert, transform
from minwm.models.rope import rotate

Held = tuple[Tensor, ...]
"""What a cache keeps keys and values of one layer in: tensors (2, b, h, tokens, …)."""
Place = slice | Tensor
"""Tokens of a cache, by range or by index."""

_STEPS = 127  # of eight bits, on each side of zero


@dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """Shape of one stream's cache; `heads` counts all branches.

    branches: 2 where keys are kept by position (RoPE) and by camera (PRoPE), in this order along the heads; else 1
    beside: room for a prompt's keys, in tokens, where the backbone keeps them beside the frames'
    """

    layers: int
    heads: int
    head_dim: int
    tokens_per_frame: int
    history: History
    branches: int = 1
    beside: int = 0

    @property
    def tokens(self) -> int:
        """Keys of one layer and head: the prompt's and the frames'."""
        return self.beside + self.frames * self.tokens_per_frame

    @property
    def frames(self) -> int:
        """Latent frames that fit: sink and window."""
        return self.history.sink + self.history.window

    def bytes(self, dtype: torch.dtype, *, eight_bit: bool = False) -> int:
        """Memory of one stream: keys and values, and those of its sink once more, raw."""
        raw = self.history.sink * self.tokens_per_frame * self.heads // self.branches * self.head_dim * dtype.itemsize
        each = self.head_dim + torch.float32.itemsize if eight_bit else self.head_dim * dtype.itemsize
        return 2 * self.layers * (self.heads * self.tokens * each + raw)


class KVCache:
    """Keys and values of `batch` streams that advance together."""

    _names: tuple[str, ...] = ("store",)  # of what is held

    def __init__(
        self, geometry: CacheGeometry, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry = geometry
        g = geometry
        shape = 2, batch, g.heads, g.tokens, g.head_dim
        self._held = [self._new(shape, dtype, device) for _ in range(g.layers)]
        raw = g.history.sink * g.tokens_per_frame
        self._raw = torch.zeros(
            (g.layers, 2, batch, raw, g.heads // g.branches, g.head_dim), dtype=dtype, device=device
        )
        self._lent = False
        self._beside: list[Beside | None] = [None] * geometry.layers
        self._end = 0

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._beside = [None] * self.geometry.layers
        self._lent, self._end = False, 0

    def skip_to(self, frame: int) -> None:
        """Go on at a later frame, with nothing in between: a pass must not reach there."""
        self._end = max(self._end, frame)

    def context(self, start: int, frames: int, window: int | None = None) -> "Cached":
        """The context of a pass over frames [start, start + frames), which it writes into the cache.

        window: latent frames attended to, the pass's included; the cache's own if not given. Passes go forward chunk by
        chunk: raises InputError for frames that leave a gap after the last ones written, or do not fit into the window.
        """
        most = self.geometry.history.window
        if not 0 <= start <= self._end or frames > most:
            raise InputError(
                f"frames {start} to {start + frames - 1}: expected at most {most} frames from {self._end} or earlier"
            )
        if window is not None and not frames <= window <= most:
            raise InputError(f"window={window}: expected from the {frames} frames of a pass to the cache's {most}")
        return Cached(self, start, frames, most if window is None else window, self._held)

    def following(self, context: "Cached", frames: int, window: int | None = None) -> "Cached":
        """The context of a pass over the frames after those of another one that is made first."""
        whole = self.geometry.history.window
        return Cached(self, context.start + context.frames, frames, whole if window is None else window, self._held)

    def keep(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keep the sink's part of raw keys and values (b, frames · n, h, d) of a pass that starts at `start`."""
        n, sink = self.geometry.tokens_per_frame, self.geometry.history.sink
        count = min(start * n + k.shape[1], sink * n) - start * n
        if count > 0:
            for part, raw in enumerate((k, v)):
                self._raw[layer, part, :, start * n : start * n + count] = raw[:, :count].detach()

    @torch.no_grad()
    def place_sinks(self, rotation: Tensor, inverse: Tensor | None) -> None:
        """Write the sink's keys and values as seen from where the stream now is, from the raw ones.

        rotation: cosines and sines of the sink's tokens at the positions they are to have
        inverse:  P⁻¹ (b, sink, 4, 4) of the cameras they are to have, where there is a branch by camera
        """
        room, tokens = self.geometry.beside, self._raw.shape[3]
        self._own()
        for layer, (k, v) in enumerate(self._raw.float()):
            branches = [(rotate(k, rotation), v)]
            if self.geometry.branches > 1:
                assert inverse is not None, "a branch by camera has cameras"
                branches.append((transform(k, inverse), transform(v, inverse)))
            placed = [torch.cat(part, dim=2).transpose(1, 2) for part in zip(*branches, strict=True)]
            self._put(layer, slice(room, room + tokens), torch.stack(placed))

    @torch.no_grad()
    def move_world(self, motion: Tensor) -> None:
        """Express what was kept by camera in a world whose origin has moved by rigid motions (b, 4, 4) in the old one.

        With viewmats V·motion in the new world, P⁻¹ becomes motion⁻¹·P⁻¹; computed in float32, rounded once.
        """
        g = self.geometry
        if g.branches == 1:
            return
        inverse = invert(motion.double()).float()[:, None]
        frames = slice(g.beside, g.tokens)
        self._own()
        for layer in range(g.layers):
            by_position, by_camera = self._get(layer, frames).chunk(2, dim=2)
            moved = [transform(part.transpose(1, 2), inverse).transpose(1, 2) for part in by_camera]
            self._put(layer, frames, torch.cat([by_position, torch.stack(moved).to(by_position.dtype)], dim=2))

    def held(self) -> tuple[Held, ...]:
        """Of every layer, what `put` and `get` work on: for passes that write by themselves, and then say `written`."""
        self._own()
        return tuple(self._held)

    def places(self, start: int, frames: int, window: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Where a pass writes its tokens, and where all that it sees then lies; None: wherever there is anything.

        For passes that leave no room in it (`fills`), with nothing beside the frames.
        """
        written = [slice(slot, slot + count) for _, count, slot in self._runs(range(start, start + frames))]
        seen = self._places(start + frames, 0, window)
        whole = seen == [slice(0, self.geometry.tokens)]
        n, device = self.geometry.tokens_per_frame, self._raw.device
        write = _indices([slice(place.start * n, place.stop * n) for place in written], device)
        return write, None if whole else _indices(seen, device)

    def fills(self, end: int) -> bool:
        """Whether a pass that ends before frame `end` leaves no room in it."""
        return end >= self.geometry.frames

    def written(self, end: int) -> None:
        """Frames before `end` were written."""
        self._end = max(self._end, end)

    @staticmethod
    def put(held: Held, place: Place, kv: Tensor) -> None:
        """Write keys and values (2, b, h, n, d) of one layer."""
        held[0][..., place, :] = kv

    @staticmethod
    def get(held: Held, place: Place) -> Tensor:
        """Keys and values (2, b, h, n, d) of one layer."""
        return held[0][..., place, :]

    def state(self) -> dict[str, Tensor]:
        """All that it holds of the frames, to be copied before the next pass; a prompt's keys are not among it."""
        held = zip(self._names, zip(*self._held, strict=True), strict=True)
        stacked = {name: torch.stack(layers) for name, layers in held}
        return {**stacked, "raw": self._raw, "end": torch.tensor(self._end)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`. Raises InputError for that of another geometry, batch or dtype."""
        own = {name: [held[number] for held in self._held] for number, name in enumerate(self._names)}
        shapes = {name: (len(layers), *layers[0].shape) for name, layers in own.items()} | {"raw": (*self._raw.shape,)}
        types = {name: layers[0].dtype for name, layers in own.items()} | {"raw": self._raw.dtype}
        if missing := shapes.keys() - state.keys():
            raise InputError(f"cache: {', '.join(sorted(missing))} is missing, expected {', '.join(sorted(shapes))}")
        for name, shape in shapes.items():
            if state[name].shape != shape or state[name].dtype != types[name]:
                raise InputError(
                    f"cache {name}: is {state[name].dtype} of shape {tuple(state[name].shape)}, "
                    f"expected {types[name]} of {shape}"
                )
        self.reset()
        for name, layers in own.items():
            for layer, kept in zip(layers, state[name], strict=True):
                layer.copy_(kept)
        self._raw.copy_(state["raw"])
        self._end = int(state["end"])

    def update(
        self,
        layer: int,
        start: int,
        frames: int,
        kv: Tensor,
        beside: Beside | None = None,
        *,
        window: int | None = None,
        gradient: bool = False,
        past: Sequence[Held] | None = None,
    ) -> Tensor:
        """Write keys and values (2, b, h, n, d) of frames [start, start + frames); all that they may see.

        What is beside the frames comes first, and is written only when it is not what was there. Where a gradient has
        to flow through the new entries, or `gradient` says that one flows past them, the stored ones are copied, not
        changed, and such a pass may be made again later: it finds in `past`, the store when its context was made, the
        frames that it saw, for the first frame to take an older one's place goes into a new store. Raises InputError
        for keys of another shape than the cache's.
        """
        n, room = self.geometry.tokens_per_frame, self.geometry.beside
        expected = (*self._held[0][0].shape[:3], frames * n, self.geometry.head_dim)
        if kv.shape != expected:
            raise InputError(f"keys and values have shape {tuple(kv.shape)}, expected {expected} as the cache")
        beside_grad = beside is not None and beside.keys.requires_grad
        grad = torch.is_grad_enabled() and (gradient or kv.requires_grad or beside_grad)
        pieces = [
            (slice(room + slot * n, room + (slot + count) * n), kv[..., first * n : (first + count) * n, :])
            for first, count, slot in self._runs(range(start, start + frames))
        ]
        length = 0 if beside is None else beside.keys.shape[1]
        if beside is not None and (grad or beside is not self._beside[layer]):
            pieces.append((slice(room - length, room), self._laid_out(beside)))
        self._end = max(self._end, start + frames)
        places = self._places(start + frames, length, window)
        if grad:
            stored = self._copied(layer, past)
            for place, values in pieces:
                stored[..., place, :] = values.to(stored.dtype)
            return _joined([stored[..., place, :] for place in places])
        if start + frames > self.geometry.frames:
            self._own()
        for place, values in pieces:
            self._put(layer, place, values)
        self._beside[layer] = beside if beside is not None else self._beside[layer]
        return _joined([self._get(layer, place) for place in places])

    def _places(self, end: int, length: int, window: int | None) -> list[slice]:
        """Where all that a pass before frame `end` sees lies: beside the frames, the sink, the last frames."""
        g = self.geometry
        n, room, sink = g.tokens_per_frame, g.beside, g.history.sink
        if window is None or window == g.history.window or end <= sink + window:
            return [slice(room - length, room + min(end, g.frames) * n)]
        runs = self._runs(range(max(sink, end - window), end))
        frames = [slice(room + slot * n, room + (slot + count) * n) for _, count, slot in runs]
        return [slice(room - length, room + sink * n), *frames]

    @staticmethod
    def _new(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Held:
        return (torch.zeros(tuple(shape), dtype=dtype, device=device),)

    def _put(self, layer: int, place: slice, kv: Tensor) -> None:
        self.put(self._held[layer], place, kv)

    def _get(self, layer: int, place: slice) -> Tensor:
        return self.get(self._held[layer], place)

    def _copied(self, layer: int, past: Sequence[Held] | None) -> Tensor:
        """A layer's entries for a pass with gradient to write into; those that are stored must stay as they are."""
        self._lent = True
        return (self._held if past is None else past)[layer][0].clone()

    def _own(self) -> None:
        """Before stored entries are changed: passes that are to be made again keep the old ones."""
        if self._lent:
            self._held = [tuple(tensor.clone() for tensor in held) for held in self._held]
            self._lent = False

    def _laid_out(self, beside: Beside) -> Tensor:
        """(2, b, h, l, d)."""
        if beside.keys.shape[1] > self.geometry.beside:
            raise InputError(
                f"prompt: has {beside.keys.shape[1]} tokens, expected at most the cache's {self.geometry.beside}"
            )
        return torch.stack(beside.repeated(self.geometry.heads)).transpose(2, 3)

    def _runs(self, frames: Sequence[int]) -> list[tuple[int, int, int]]:
        """(offset among the frames, count, slot) of every contiguous piece that the frames occupy."""
        runs: list[tuple[int, int, int]] = []
        for offset, frame in enumerate(frames):
            slot = self._slot(frame)
            if runs and runs[-1][2] + runs[-1][1] == slot:
                first, count, place = runs[-1]
                runs[-1] = (first, count + 1, place)
            else:
                runs.append((offset, 1, slot))
        return runs

    def _slot(self, frame: int) -> int:
        sink, window = self.geometry.history.sink, self.geometry.history.window
        return frame if frame < sink else sink + (frame - sink) % window


class EightBitCache(KVCache):
    """A cache of half the size: whole numbers from −127 to 127, with a float32 scale for every head of every token.

    What is read is off by half a step at most, a 254th of the largest number that shares its scale. For passes without
    gradient alone.
    """

    _names = ("store", "scale")

    def __init__(
        self, geometry: CacheGeometry, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """dtype: of the sink's raw keys and values."""
        super().__init__(geometry, batch, dtype, device)

    @staticmethod
    def _new(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Held:
        scale = torch.ones((*shape[:-1], 1), device=device)
        return torch.zeros(tuple(shape), dtype=torch.int8, device=device), scale

    @staticmethod
    def put(held: Held, place: Place, kv: Tensor) -> None:
        scale = kv.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / _STEPS
        held[0][..., place, :] = (kv.float() / scale).round().to(torch.int8)
        held[1][..., place, :] = scale

    @staticmethod
    def get(held: Held, place: Place) -> Tensor:
        return held[0][..., place, :] * held[1][..., place, :]

    def _copied(self, layer: int, past: Sequence[Held] | None) -> Tensor:
        raise InputError("cache: has eight bits, expected no gradient to flow past it")


def _indices(places: Sequence[slice], device: torch.device) -> Tensor:
    """Of all the tokens at these places."""
    return torch.cat([torch.arange(place.start, place.stop) for place in places]).to(device)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """One after the other; what lies together already is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim=-2)


@dataclass(frozen=True)
class Cached:
    """A pass over frames [start, start + frames) that sees the cache's past, as far as `window` reaches, and itself.

    past: what the cache held when the pass was made, for when it is made again to compute its gradient
    """

    cache: KVCache
    start: int
    frames: int
    window: int | None = None
    past: Sequence[Held] | None = None
    bidirectional = False

    @property
    def positions(self) -> Sequence[int]:
        return range(self.start, self.start + self.frames)

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        return (self.positions,)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self.start < self.cache.geometry.history.sink:
            self.cache.keep(layer, self.start, k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        kv = torch.stack([k, v]).transpose(2, 3)
        stored = self.cache.update(
            layer,
            self.start,
            self.frames,
            kv,
            beside,
            window=self.window,
            gradient=q.requires_grad,
            past=self.past,
        )
        seen = stored.to(q.dtype)
        keys, values = seen.transpose(2, 3).unbind(0)
        mask = None if beside is None else beside.key_mask(keys.shape[1] - beside.keys.shape[1])
        return attention(q, keys, values, mask)
