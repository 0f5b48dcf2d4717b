"""Random draws keyed by (seed, step, sample, purpose), never by rank or order of calls.

The same sample in the same step gets the same noise whether the batch is one, accumulated, or
spread over processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minwm.randomness import generator


class Draw:
    """The random numbers of one micro-batch: `samples` are the samples' numbers in the global batch."""

    def __init__(self, seed: int, step: int, samples: Sequence[int]) -> None:
        self._seed, self._step = seed, step
        self.samples = samples

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, (samples, *shape)."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators(purpose)])

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), (samples, *shape)."""
        return torch.stack([torch.rand(tuple(shape), generator=g) for g in self._generators(purpose)])

    def integer(self, purpose: str, high: int) -> Tensor:
        """Uniform in {0, …, high − 1}, (samples,)."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self._generators(purpose)])

    def shared_integer(self, purpose: str, high: int) -> int:
        """One integer in {0, …, high − 1} for the whole step."""
        return int(torch.randint(high, (), generator=generator(self._seed, self._step, "all", purpose)))

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [generator(self._seed, self._step, sample, purpose) for sample in self.samples]
