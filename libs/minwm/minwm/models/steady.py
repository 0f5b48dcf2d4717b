"""Passes of streams whose windows are full, as one function of tensors: compiled, or captured as CUDA graphs.

From the first full window on, nothing of a pass changes from chunk to chunk but numbers: where keys and values are
written, and what is seen of them, are index tensors; rotations and cameras are made before. Each number of streams and
each window are compiled or captured once, at their first pass. Passes of streams that are still filling their windows
are not for here.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor

from minwm.errors import ConfigError
from minwm.models.cache import Cached, Held, KVCache
from minwm.models.conditions import Conditions, Frames
from minwm.models.context import Beside, attention
from minwm.models.prope import Projection
from minwm.models.transformer import Prompt, Transformer
from minwm.models.wan import Step, Wan, WanPrompt

_VARIANTS = 64  # numbers of streams times windows, or sets of streams whose graphs are kept


@dataclass(frozen=True)
class Places:
    """A context whose streams write where `write` says, and see what `seen` says; tokens by index, a tensor a stream.

    seen: None where all that is held is seen
    """

    kind: type[KVCache]
    held: Sequence[Sequence[Held]]
    frames: int
    write: tuple[Tensor, ...]
    seen: tuple[Tensor, ...] | None
    bidirectional = False

    @property
    def positions(self) -> Sequence[int]:
        """Any frames that no stream begins with; where they really stand is in the rotation."""
        return range(1, 1 + self.frames)

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        return (self.positions,)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        pass  # of the sink, which full windows have behind them

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        assert beside is None, "a Wan has nothing beside its frames"
        read = []
        for number, held in enumerate(self.held):
            row = slice(number, number + 1)
            self.kind.put(held[layer], self.write[number], torch.stack([k[row], v[row]]).transpose(2, 3))
            stored = self.kind.get(held[layer], slice(None) if self.seen is None else self.seen[number])
            keys, values = stored.to(q.dtype).transpose(2, 3).unbind(0)
            read.append(attention(q[row], keys, values))
        return read[0] if len(read) == 1 else torch.cat(read)


@dataclass(frozen=True)
class Inputs:
    """What changes from pass to pass: shapes as `Wan.forward` and `Places` have them."""

    latents: Tensor
    timesteps: Tensor
    prompt: WanPrompt
    conditions: Conditions
    rotation: Tensor
    camera: Projection | None
    write: tuple[Tensor, ...]
    seen: tuple[Tensor, ...] | None


Caches = tuple[tuple[Held, ...], ...]
"""What the streams' caches hold, layer by layer."""
Function = Callable[[Caches, Inputs], Tensor]


class SteadyPasses:
    """A model's passes over streams at full windows; called as the model is."""

    def __init__(self, model: Transformer, *, compiled: bool, graphs: bool) -> None:
        """compiled: by a C++ compiler on CPUs, Triton on GPUs; graphs: CUDA graphs.

        Raises ConfigError for what is no Wan, and for graphs of a model that is on no GPU.
        """
        if not isinstance(model, Wan):
            raise ConfigError(f"compiled={compiled}, graphs={graphs}: {type(model).__name__}, expected a Wan")
        device = next(model.parameters()).device
        if graphs and device.type != "cuda":
            raise ConfigError(f"graphs: model on {device}, expected a CUDA device")
        self._model = model
        self._compiled, self._graphs = compiled, graphs
        self._functions: dict[type[KVCache], Function] = {}
        self._captured: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()

    def take(self, contexts: Sequence[Cached]) -> bool:
        """Whether all streams' windows are full, and as wide."""
        full = all(context.cache.fills(context.start + context.frames) for context in contexts)
        return full and len({context.window for context in contexts}) == 1

    def __call__(
        self, latents: Tensor, timesteps: Tensor, prompt: Prompt, contexts: Sequence[Cached], conditions: Conditions
    ) -> Tensor:
        """Velocity (b, f, c, y, x) of streams that `take` is true for, a context each (b = 1)."""
        rows, columns = self._model.grid(latents, timesteps, contexts[0])
        each = [context.cache.places(context.start, context.frames, context.window) for context in contexts]
        seen = [tokens for _, tokens in each if tokens is not None]
        streams = [context.positions for context in contexts]
        by_camera = "camera_prope" in self._model.config.conditions
        frames = Frames(batch=len(latents), positions=contexts[0].positions, rows=rows, columns=columns)
        inputs = Inputs(
            latents=latents,
            timesteps=timesteps,
            prompt=cast(WanPrompt, prompt),
            conditions=Conditions(conditions.cameras, conditions.actions),
            rotation=self._model.rotation(streams, rows, columns, latents.device),
            camera=frames.cameras(conditions).projection if by_camera else None,
            write=tuple(tokens for tokens, _ in each),
            seen=tuple(seen) if seen else None,
        )
        held = tuple(context.cache.held() for context in contexts)
        kind = type(contexts[0].cache)
        run = self._graph(kind, held, inputs) if self._graphs else self._function(kind)
        velocity = run(held, inputs)
        for context in contexts:
            context.cache.written(context.start + context.frames)
        return velocity

    def function(self, kind: type[KVCache]) -> Function:
        """The pass by caches of one kind, neither compiled nor captured."""
        model = self._model
        high, wide = model.config.patch

        def run(held: Caches, inputs: Inputs) -> Tensor:
            b, f, _, y, x = inputs.latents.shape
            context = Places(kind, held, f, inputs.write, inputs.seen)
            step = Step(context, inputs.rotation, inputs.camera)
            frames = Frames(batch=b, positions=context.positions, rows=y // high, columns=x // wide)
            return model.velocity(inputs.latents, inputs.timesteps, inputs.prompt, step, inputs.conditions, frames)

        return run

    def _function(self, kind: type[KVCache]) -> Function:
        if kind not in self._functions:
            run = self.function(kind)
            self._functions[kind] = _compile(run) if self._compiled else run
        return self._functions[kind]

    def _graph(self, kind: type[KVCache], held: Caches, inputs: Inputs) -> "_Graph":
        """The graph that writes into these very caches; the least recently used is let go."""
        widths = None if inputs.seen is None else inputs.seen[0].shape
        key = (kind, tuple(tensor.data_ptr() for tensor in tensors(held)), inputs.latents.shape, widths)
        if key not in self._captured:
            self._captured[key] = _Graph(self._function(kind), held, inputs)
            if len(self._captured) > _VARIANTS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return self._captured[key]


class _Graph:
    """A pass captured as a CUDA graph: inputs are copied to where the capture's lie, and it is launched whole."""

    def __init__(self, run: Function, held: Caches, inputs: Inputs) -> None:
        self._inputs = copy.deepcopy(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is lazy must be done before: libraries' workspaces, compilation
            for _ in range(2):
                run(held, self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._velocity = run(held, self._inputs)

    def __call__(self, held: Caches, inputs: Inputs) -> Tensor:
        for mine, given in zip(tensors(self._inputs), tensors(inputs), strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._velocity.clone()


def tensors(tree: Any) -> Iterator[Tensor]:
    """All in a tree of dataclasses and tuples, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for member in tree:
            yield from tensors(member)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from tensors(getattr(tree, field.name))


def _compile(run: Function) -> Function:
    """For each shape by itself, the weights laid out once as matrix units want them."""
    compiled = torch.compile(run, dynamic=False, fullgraph=True, options={"freezing": True})

    def call(held: Caches, inputs: Inputs) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
            return compiled(held, inputs)

    return call
