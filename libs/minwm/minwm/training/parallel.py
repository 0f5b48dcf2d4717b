"""The processes of a run, as the loop sees them: who computes which samples, on which device, and who writes.

One process only: a group of one.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from minwm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """zero: DeepSpeed's ZeRO stage. sequence: processes that share one sample."""

    zero: Literal[0, 1, 2, 3] = 0
    sequence: int = 1


class Processes:
    """The group of one."""

    rank = data_rank = 0
    world = data_size = 1
    is_main = True

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def share(self, numbers: range) -> range:
        """The part of a global batch that this data rank computes. Raises ConfigError when it does not divide."""
        if len(numbers) % self.data_size:
            raise ConfigError(f"a batch of {len(numbers)}: expected a multiple of the {self.data_size} data ranks")
        return numbers

    def mean(self, value: float) -> float:
        """The mean of `value` over the data ranks."""
        return value

    def barrier(self) -> None:
        """Wait for every process."""

    def close(self) -> None:
        """Leave the group."""


def join(config: ParallelConfig) -> Processes:
    """Make a group of one. Raises ConfigError where several processes are asked for."""
    if config != ParallelConfig():
        raise ConfigError(f"{config}: expected the default, there is one process")
    return Processes()


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Parameters whole on every rank, for reading."""
    return nullcontext()
