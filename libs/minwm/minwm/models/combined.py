"""Contexts made of contexts, so that several passes are made as one.

`Together`: streams that stand at different places, each before a cache of its own. `InTurn`: one stream's frames
after each other, where the later ones see what the earlier ones write; the last chunk's clean context and the next
chunk's first step are so made in one pass, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from minwm.errors import InputError
from minwm.models.conditions import Conditions
from minwm.models.context import Beside, Context
from minwm.models.prope import Cameras
from minwm.models.transformer import Prompt

P = TypeVar("P", bound=Prompt)


@dataclass(frozen=True)
class Together:
    """One context for each stream (b = 1 each) of the batch; all of as many frames."""

    contexts: Sequence[Context]
    bidirectional = False

    def __post_init__(self) -> None:
        positions = [context.positions for context in self.contexts]
        if len({(len(own), 0 in own) for own in positions}) != 1:
            raise InputError(
                f"streams together: are of {[len(own) for own in positions]} frames, expected as many of each, "
                "and either all of them or none of them at their beginning"
            )

    @property
    def positions(self) -> Sequence[int]:
        return self.contexts[0].positions

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        return tuple(context.positions for context in self.contexts)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        for context, own in zip(self.contexts, zip(k.split(1), v.split(1), strict=True), strict=True):
            context.keep(layer, *own)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        rows = zip(q.split(1), k.split(1), v.split(1), strict=True)
        read = [
            context.attend(layer, *row, None if beside is None else _stream(beside, number))
            for number, (context, row) in enumerate(zip(self.contexts, rows, strict=True))
        ]
        return torch.cat(read)


@dataclass(frozen=True)
class InTurn:
    """Passes over one stream's frames, one after the other."""

    contexts: Sequence[Context]
    bidirectional = False

    @cached_property
    def positions(self) -> Sequence[int]:
        return tuple(chain.from_iterable(context.positions for context in self.contexts))

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        return (self.positions,)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        for context, *own in zip(self.contexts, self._parts(k), self._parts(v), strict=True):
            context.keep(layer, *own)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        parts = zip(self.contexts, *(self._parts(x) for x in (q, k, v)), strict=True)
        return torch.cat([context.attend(layer, *own, beside) for context, *own in parts], dim=1)

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        """Of tokens (b, n, h, d), those of every pass."""
        tokens = x.shape[1] // len(self.positions)
        return torch.split(x, [tokens * len(context.positions) for context in self.contexts], dim=1)


def together(contexts: Sequence[Context]) -> Context:
    """One pass over the streams of several contexts."""
    return contexts[0] if len(contexts) == 1 else Together(contexts)


def join_conditions(parts: Sequence[Conditions], dim: int = 0) -> Conditions:
    """Those of several streams (dim 0), or of one run of frames after another (dim 1)."""
    if len(parts) == 1:
        return parts[0]
    cameras = None
    if parts[0].cameras is not None:
        each = [cast(Cameras, part.cameras) for part in parts]
        cameras = Cameras(
            torch.cat([one.viewmats for one in each], dim=dim),
            torch.cat([one.intrinsics for one in each]) if dim == 0 else each[0].intrinsics,
            torch.cat([one.motions for one in each], dim=dim),
        )
    actions = None if parts[0].actions is None else torch.cat([cast(Tensor, part.actions) for part in parts], dim=dim)
    images = [part.image for part in parts if part.image is not None]
    image = None
    if images:
        image = images[0]
        if dim == 0:
            image = torch.cat([torch.zeros_like(images[0]) if part.image is None else part.image for part in parts])
    return Conditions(cameras, actions, image)


def join_prompts(prompts: Sequence[P]) -> P:
    """One prompt of several streams."""
    return prompts[0] if len(prompts) == 1 else cast(P, _joined(prompts))


def _stream(beside: Beside, number: int) -> Beside:
    row = slice(number, number + 1)
    mask = None if beside.mask is None else beside.mask[row]
    return Beside(beside.keys[row], beside.values[row], mask)


def _joined(parts: Sequence[Any]) -> Any:
    """Equal trees of dataclasses, tuples and tensors as one, stream after stream."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(tuple(parts))
    if isinstance(first, tuple):
        return tuple(_joined(members) for members in zip(*parts, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        members = {field.name: [getattr(part, field.name) for part in parts] for field in fields(first)}
        return type(first)(**{name: _joined(values) for name, values in members.items()})
    return first
