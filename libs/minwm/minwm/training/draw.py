"""Random draws keyed by (seed, step, sample, purpose), never by rank or order of calls.

The same sample in the same step gets the same noise whether the batch is one, accumulated, or
spread over processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minwm.randomness import generator


class Draw:
    """The random numbers of one micro-batch: `samples` are the samples' numbers in the global batch.

    Numbers are drawn on the CPU, whatever the device they are for: devices do not differ.
    """

    def __init__(self, seed: int, step: int, samples: Sequence[int], device: torch.device | str = "cpu") -> None:
        """device: where tensors of numbers are wanted."""
        self._seed, self._step = seed, step
        self.samples, self.device = samples, device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, (samples, *shape)."""
        return self._stack([torch.randn(tuple(shape), generator=g) for g in self._generators(purpose)])

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), (samples, *shape)."""
        return self._stack([torch.rand(tuple(shape), generator=g) for g in self._generators(purpose)])

    def integer(self, purpose: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in {0, …, high − 1}, (samples, *shape)."""
        return self._stack([torch.randint(high, tuple(shape), generator=g) for g in self._generators(purpose)])

    def shared_integer(self, purpose: str, high: int) -> int:
        """One integer in {0, …, high − 1} for the whole step."""
        return int(torch.randint(high, (), generator=generator(self._seed, self._step, "all", purpose)))

    def lasting_normal(self, purpose: str, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, `shape`: one and the same for what is called `name` in every step of the run."""
        return torch.randn(tuple(shape), generator=generator(self._seed, name, purpose))

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [generator(self._seed, self._step, sample, purpose) for sample in self.samples]

    def _stack(self, drawn: list[Tensor]) -> Tensor:
        return torch.stack(drawn).to(self.device)
