"""Attention contexts: what a forward pass may look at.

One set of weights runs bidirectionally, with a teacher-forcing mask, or causally from a cache,
by the context it is given. `History` holds the one rule of visibility; masks and cache both ask it.
Queries, keys and values are (b, n, h, d) with n = frames · tokens per frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minwm.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class History:
    """What a chunk of latent frames sees of the past.

    chunk:  latent frames generated together
    window: latent frames attended to, the current chunk included
    sink:   first latent frames that stay visible beside the window. In a rollout that has left them behind they stand
            at the positions just before the window, however long ago they were
    sink_reach: world units that a sink's camera may be from the chunk's; a farther one is seen at that distance, in the
            same direction, looking the same way. None: where it was
    """

    chunk: int
    window: int
    sink: int = 0
    sink_reach: float | None = None

    def __post_init__(self) -> None:
        if self.sink_reach is not None and not 0 < self.sink_reach < math.inf:
            raise ConfigError(f"history.sink_reach={self.sink_reach}: expected a distance above 0")
        if self.chunk < 1 or self.window < self.chunk or self.sink < 0:
            raise ConfigError(
                f"history: chunk={self.chunk}, window={self.window}, sink={self.sink}: "
                "expected 1 <= chunk <= window, sink >= 0"
            )

    def chunk_end(self, frame: int) -> int:
        """One past the last frame of the chunk that `frame` belongs to."""
        return (frame // self.chunk + 1) * self.chunk

    def require_chunks(self, frames: int) -> None:
        """Raise InputError unless `frames` latent frames are a whole number of chunks."""
        if frames % self.chunk:
            raise InputError(f"frames={frames}: expected a multiple of the chunk, {self.chunk} latent frames")

    def sees(self, end: int, frame: int) -> bool:
        """Whether a chunk that ends before `end` sees `frame`, one of its own or an earlier one."""
        return frame < end and (frame >= end - self.window or frame < self.sink)


@dataclass(frozen=True)
class Beside:
    """Keys and values (b, l, h, d) that every frame sees beside the frames: a prompt's.

    mask: (b, l), which of them are real; None where all are. `h` may be a whole part of the queries' heads, and
    is then repeated.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None

    def detach(self) -> "Beside":
        """The same, without gradient."""
        return Beside(self.keys.detach(), self.values.detach(), self.mask)

    def repeated(self, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values of as many heads as asked for."""
        times = heads // self.keys.shape[2]
        return self.keys.repeat(1, 1, times, 1), self.values.repeat(1, 1, times, 1)

    def key_mask(self, others: int) -> Tensor | None:
        """(b, 1, 1, l + others): what may be seen of these and of `others` further keys; None: everything."""
        return None if self.mask is None else F.pad(self.mask, (0, others), value=True)[:, None, None]


class Context(Protocol):
    """Where the frames of a pass stand in the stream, and what they attend to."""

    @property
    def positions(self) -> Sequence[int]:
        """Absolute index of each latent frame of the pass."""

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        """The same of every stream, where streams stand at different places; else once, for all."""

    @property
    def bidirectional(self) -> bool:
        """Whether every frame sees every frame, so that a text stream may see them too."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        """Attention of one layer, (b, n, h, d)."""

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take note of keys (normalised) and values (b, n, h, d) before they are placed; `attend` follows."""


class Bidirectional(Context, Protocol):
    """A context in which a text stream sees the frames as they see each other."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, beside: Beside) -> Tensor:
        """Attention (b, l, h, d) of text queries to what is beside the frames and to all frames."""


@dataclass(frozen=True)
class Full:
    """Every frame sees every frame: bidirectional."""

    frames: int
    bidirectional = True

    @property
    def positions(self) -> Sequence[int]:
        return range(self.frames)

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        return (self.positions,)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        if beside is None:
            return attention(q, k, v)
        keys, values = beside.repeated(q.shape[2])
        mask = beside.key_mask(k.shape[1])
        return attention(q, torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1), mask)

    def read(self, q: Tensor, k: Tensor, v: Tensor, beside: Beside) -> Tensor:
        return self.attend(0, q, k, v, beside)  # whose queries they are makes no difference where all see all


@dataclass(frozen=True, eq=False)
class Masked:
    """Frames at `positions`, where query frame i sees key frame j if `mask[i, j]`, and at least one.

    On a GPU one FlexAttention call; elsewhere frames that see the same are taken together, with the keys they see.
    """

    positions: Sequence[int]
    mask: Tensor
    bidirectional = False

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        return (self.positions,)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        pass

    @cached_property
    def groups(self) -> list[tuple[int, list[int]]]:
        """Runs of query frames that see the same: how many, and the key frames."""
        rows = groupby(self.mask.tolist())
        return [(len(list(run)), [key for key, seen in enumerate(row) if seen]) for row, run in rows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        if q.device.type == "cuda":
            from minwm.models.flex import masked_attention

            return masked_attention(q, k, v, self, beside)
        tokens = q.shape[1] // len(self.positions)
        queries = q.split([tokens * count for count, _ in self.groups], dim=1)
        keys, values = k.split(tokens, dim=1), v.split(tokens, dim=1)
        read = []
        for own, (_, seen) in zip(queries, self.groups, strict=True):
            some = Full(len(seen))
            seen_k, seen_v = (torch.cat([frames[key] for key in seen], dim=1) for frames in (keys, values))
            read.append(some.attend(layer, own, seen_k, seen_v, beside))
        return torch.cat(read, dim=1)


@lru_cache(maxsize=16)  # all steps of a training ask for the same, and a GPU's block mask is kept by it
def teacher_forcing(frames: int, history: History) -> Masked:
    """Clean frames followed by the same frames noisy, (2·frames) in all.

    A clean chunk sees itself and the earlier clean chunks; a noisy chunk sees itself and the
    earlier clean chunks; both as far as the window and the sink reach. Raises InputError for frames that
    do not divide into chunks.

    A sink stands where it was; in a rollout just before the window, once that has left it behind. The two
    agree on clips of up to window + sink frames.
    """
    history.require_chunks(frames)
    allowed = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
    for query in range(frames):
        end = history.chunk_end(query)
        start = end - history.chunk
        for key in range(end):
            visible = history.sees(end, key)
            allowed[query, key] = visible
            allowed[frames + query, key] = visible and key < start
            allowed[frames + query, frames + key] = start <= key
    return Masked((*range(frames), *range(frames)), allowed)


_SHORT = 512  # tokens up to which plain products train faster on a CPU than its fused kernel (measured)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over (b, n, h, d), where `mask` (…, queries, keys) is true."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.requires_grad and q.device.type == "cpu" and max(q.shape[2], k.shape[2]) <= _SHORT:
        return _plain_attention(q, k, v, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    weights: Tensor = logits.softmax(-1).to(v.dtype)
    return weights @ v
