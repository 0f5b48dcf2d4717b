"""A slow average of a network's weights in float32, spread over the processes: each keeps its part of every parameter.

Its state is the whole average, so it can be saved by any number of processes and loaded by any other. Where the
average is itself a network that runs (the target of consistency), `update_average` moves that network instead.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from minwm.training.parallel import part, whole


class Average(nn.Module):
    """average ← decay · average + (1 − decay) · weights. All processes call every method together, saving included."""

    slices: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        own = [self._own(parameter) for parameter in network.parameters()]
        self._lengths = [len(piece) for piece in own]
        self.register_buffer("slices", torch.cat(own), persistent=False)
        self._whole: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Move towards the weights of a network like the first."""
        for piece, parameter in zip(self.slices.split(self._lengths), network.parameters(), strict=True):
            with whole([parameter]):
                piece.lerp_(self._own(parameter).to(piece.device), 1 - decay)

    def full(self) -> dict[str, Tensor]:
        """The average of every parameter by name, whole, float32."""
        if self._whole is not None:
            return self._whole
        world = _place()[1]
        ranks = [torch.empty_like(self.slices) for _ in range(world)] if world > 1 else [self.slices.clone()]
        if world > 1:
            distributed.all_gather(ranks, self.slices)
        pieces = zip(*(slices.split(self._lengths) for slices in ranks), strict=True)
        return {
            name: torch.cat(parts)[: shape.numel()].view(shape)
            for (name, shape), parts in zip(self._shapes.items(), pieces, strict=True)
        }

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Make the average a network's weights."""
        average = self.full()
        for name, parameter in network.named_parameters():
            parameter.copy_(average[name])

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A while in which any process may read the average by itself. All processes enter together."""
        self._whole = self.full()
        try:
            yield
        finally:
            self._whole = None

    def _own(self, parameter: Tensor) -> Tensor:
        return part(parameter.detach().float(), *_place())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: value for name, value in self.full().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        own = [self._own(state_dict[prefix + name]) for name in self._shapes]
        self.slices.copy_(torch.cat(own))


@contextmanager
def gathered(*networks: nn.Module) -> Iterator[None]:
    """Networks (under ZeRO-3) and averages whole on every rank, so that one may save them. All enter together."""
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(network.gathered() if isinstance(network, Average) else whole(network.parameters()))
        yield


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · weights, in the average's precision."""
    for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
        with whole([fast]):
            slow.lerp_(fast.to(slow.dtype), 1 - decay)


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
