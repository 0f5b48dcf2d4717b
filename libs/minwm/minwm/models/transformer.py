"""What every backbone is: a transformer that predicts flow velocities, frame by frame, in any context.

A backbone is one file that subclasses `Transformer`: names of modules are its official checkpoints', the rest
(conditions, contexts, caches, checkpoints, training, serving) it shares. Latents are (b, f, c, y, x).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minwm.errors import InputError
from minwm.models.cache import CacheGeometry
from minwm.models.conditions import ConditionName, Conditions
from minwm.models.context import Context, History

T = TypeVar("T")


class Prompt(Protocol):
    """A prompt as a backbone keeps it: computed once, used in every pass."""

    def detach(self) -> Self:
        """The same, without gradient."""


class Architecture(Protocol):
    """Sizes of a backbone: a frozen dataclass whose `kind` names the class it builds."""

    @property
    def kind(self) -> str: ...

    @property
    def channels(self) -> int:
        """Channels of a latent."""

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and columns of latents that make one token."""

    @property
    def layers(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def conditions(self) -> tuple[ConditionName, ...]:
        """What steers it beside the prompt."""

    def cache_geometry(self, rows: int, columns: int, history: History) -> CacheGeometry:
        """What a stream of latents of rows × columns keeps."""


class Transformer(nn.Module):
    """Base of the backbones.

    checkpoint_activations: whether a pass with gradient keeps what goes into its blocks alone, and makes the rest
        again when the gradient comes back: a third more work for a fraction of the memory
    """

    checkpoint_activations = False

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    @abstractmethod
    def prompt(self, text: Any, *, bidirectional: bool = False) -> Prompt:
        """A prompt for passes of one kind: causal ones (masked or cached), or bidirectional ones."""

    @abstractmethod
    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt: Any,
        context: Context,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Velocity (b, f, c, y, x) of latents (b, f, c, y, x) at timesteps (b, f) in [0, 1000]."""

    @abstractmethod
    def rotation(self, streams: Sequence[Sequence[int]], rows: int, columns: int, device: torch.device) -> Tensor:
        """Rotary phases of tokens of these frames: of all streams (n, d/2, 2), or of each (b, n, d/2, 2)."""

    def run(self, block: Callable[..., T], *inputs: Any) -> T:
        """A block's output, made again in the backward pass where `checkpoint_activations` asks for it."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return block(*inputs)
        return cast(T, checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False))

    def grid(self, latents: Tensor, timesteps: Tensor, context: Context) -> tuple[int, int]:
        """Rows and columns of tokens of a frame. Raises InputError for what does not fit the model or the context."""
        shape, patch = tuple(latents.shape), self.architecture.patch
        if len(shape) != 5 or shape[2] != self.architecture.channels:
            raise InputError(f"latents have shape {shape}, expected (b, f, {self.architecture.channels}, y, x)")
        if shape[3] % patch[0] or shape[4] % patch[1]:
            raise InputError(
                f"latents are {shape[3]}x{shape[4]}, expected sides in multiples of {patch[0]} and {patch[1]}"
            )
        if shape[1] != len(context.positions):
            raise InputError(f"latents have {shape[1]} frames, expected the context's {len(context.positions)}")
        if timesteps.shape != shape[:2]:
            raise InputError(f"timesteps have shape {tuple(timesteps.shape)}, expected {shape[:2]}: one per frame")
        return shape[3] // patch[0], shape[4] // patch[1]


def require_batch(prompts: int, streams: int) -> None:
    """Raise InputError unless there is a prompt for every stream."""
    if prompts != streams:
        raise InputError(f"prompt: is of {prompts} streams, expected {streams} as the latents")


def require_length(name: str, length: int, limit: int) -> None:
    """Raise InputError for a prompt that is longer than the model takes."""
    if length > limit:
        raise InputError(f"{name}: has {length} tokens, expected at most {limit}")
