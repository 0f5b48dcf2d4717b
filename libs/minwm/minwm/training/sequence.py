"""Sequence parallelism (DeepSpeed Ulysses, arXiv 2309.14509) of any backbone, in any context.

Each process of a sequence group takes a contiguous part of a pass's frames through the network. In attention they
change over, all frames of a part of the heads, and back; the velocities are gathered at the end. Models and stages
know nothing of it: the passes they ask for are cut and put together by hooks, the cache keeps a part of the heads.

Gradients of the gathered velocity are multiplied by the group's size, so that parameters' gradients, which are
sums over the group, are right as the mean over all processes that engines take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from minwm.errors import ConfigError
from minwm.models.cache import CacheGeometry
from minwm.models.conditions import Conditions
from minwm.models.context import Beside, Bidirectional, Context, History
from minwm.models.transformer import Architecture, Prompt, Transformer

_Pass = tuple[Tensor, Tensor, Prompt, Context, Conditions | None]


def split_sequence(model: Transformer, group: distributed.ProcessGroup) -> None:
    """Share out every pass of `model`, and of copies made of it, over a group of processes that ask for the same.

    Raises ConfigError where heads or, in a pass, frames do not divide into as many parts.
    """
    size = group.size()
    architecture = model.architecture
    if architecture.heads % size:
        raise ConfigError(f"parallel.sequence={size}: expected a divisor of the model's {architecture.heads} heads")
    if "first_image" in architecture.conditions:
        raise ConfigError(
            f"parallel.sequence={size}: expected 1 with the condition first_image, whose weights only frame 0 uses"
        )
    model.architecture = cast(Architecture, _PartOfHeads(architecture, size))

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Pass, dict[str, Any]]:
        latents, timesteps, prompt, context, conditions = _pass(*args, **kwargs)
        frames = len(context.positions)
        if frames % size:
            raise ConfigError(f"parallel.sequence={size}: expected a divisor of the pass's {frames} latent frames")
        own = _own(frames, group)
        return (
            _apply(_Cut, latents, group),
            timesteps[:, own],
            prompt,
            PartOfFrames(context, group),
            None if conditions is None else conditions.frames(own.start, own.stop),
        ), {}

    def put_together(module: nn.Module, args: tuple[Any, ...], velocity: Tensor) -> Tensor:
        return _apply(_Join, velocity, group)

    model.register_forward_pre_hook(cut, with_kwargs=True)
    model.register_forward_hook(put_together)


@dataclass(frozen=True)
class PartOfFrames:
    """A context whose frames are spread over a group: this process's are a contiguous part."""

    whole: Context
    group: distributed.ProcessGroup

    @property
    def positions(self) -> Sequence[int]:
        positions = self.whole.positions
        return positions[_own(len(positions), self.group)]

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        return (self.positions,)

    @property
    def bidirectional(self) -> bool:
        return self.whole.bidirectional

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        pass

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        heads = q.shape[2]
        q, k, v = exchange(torch.stack([q, k, v]), self.group, scatter=3, gather=2).unbind()
        read = self.whole.attend(layer, q, k, v, beside and self._heads_of(beside, heads))
        return exchange(read, self.group, scatter=1, gather=2)

    def read(self, q: Tensor, k: Tensor, v: Tensor, beside: Beside) -> Tensor:
        """The text's queries (b, l, h, d) are everybody's: each process reads with its part of their heads."""
        heads = q.shape[2]
        k, v = exchange(torch.stack([k, v]), self.group, scatter=3, gather=2).unbind()
        own = q[:, :, _own(heads, self.group)]
        read = cast(Bidirectional, self.whole).read(own, k, v, self._heads_of(beside, heads))
        return _apply(_JoinHeads, read, self.group)

    def _heads_of(self, beside: Beside, heads: int) -> Beside:
        own = _own(heads, self.group)
        keys, values = beside.repeated(heads)
        return Beside(keys[:, :, own], values[:, :, own], beside.mask)


class _PartOfHeads:
    """An architecture whose caches keep one process's part of the heads."""

    def __init__(self, architecture: Architecture, size: int) -> None:
        self._architecture, self._size = architecture, size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._architecture, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_PartOfHeads":
        return self

    def cache_geometry(self, rows: int, columns: int, history: History) -> CacheGeometry:
        geometry = self._architecture.cache_geometry(rows, columns, history)
        return replace(geometry, heads=geometry.heads // self._size)


def exchange(x: Tensor, group: distributed.ProcessGroup, *, scatter: int, gather: int) -> Tensor:
    """Dimension `scatter` cut into a part for each process, everybody's parts joined along `gather`, in rank order."""
    return _apply(_Exchange, x, group, scatter, gather)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup, scatter: int, gather: int) -> Tensor:
        ctx.group, ctx.scatter, ctx.gather = group, scatter, gather
        return _exchanged(x, group, scatter, gather)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, ctx.group, ctx.gather, ctx.scatter), None, None, None


class _Cut(torch.autograd.Function):
    """This process's frames of (b, f, …), which all have whole and go on to use alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return x[:, _own(x.shape[1], group)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group, 1) / ctx.group.size(), None


class _Join(torch.autograd.Function):
    """Frames (b, f / size, …) of all processes, joined for a loss that all compute alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, _own(grad.shape[1], ctx.group)] * ctx.group.size(), None


class _JoinHeads(torch.autograd.Function):
    """Heads (b, l, h / size, d) of all processes, joined for what each uses in its own way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(x, group, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _received(grad, ctx.group, 2).sum(0), None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return function.apply(*args)  # type: ignore[no-any-return]


def _pass(
    latents: Tensor, timesteps: Tensor, prompt: Prompt, context: Context, conditions: Conditions | None = None
) -> _Pass:
    """What a backbone's forward was called with."""
    return latents, timesteps, prompt, context, conditions


def _own(length: int, group: distributed.ProcessGroup) -> slice:
    part = length // group.size()
    return slice(group.rank() * part, (group.rank() + 1) * part)


def _received(x: Tensor, group: distributed.ProcessGroup, scatter: int) -> Tensor:
    """What the processes have for this one (size, …), when each cuts its own along `scatter`."""
    sent = torch.stack(x.chunk(group.size(), scatter))
    received = torch.empty_like(sent)
    distributed.all_to_all_single(received, sent, group=group)
    return received


def _exchanged(x: Tensor, group: distributed.ProcessGroup, scatter: int, gather: int) -> Tensor:
    return torch.cat(_received(x, group, scatter).unbind(), gather)


def _gathered(x: Tensor, group: distributed.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)
