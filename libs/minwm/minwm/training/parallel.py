"""The processes that train together: who they are, which samples each computes, what they share.

A launcher (torchrun, deepspeed) says who a process is; without one it is alone. Consecutive ranks form a sequence
group, whose members split the frames of the same samples; the groups split the samples. NCCL on CUDA, gloo on CPU.
"""

import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from minwm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over processes.

    zero:     what they share out: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too
    sequence: processes that split the frames of one sample
    """

    zero: Literal[0, 1, 2, 3] = 0
    sequence: int = 1

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise ConfigError(f"parallel.sequence={self.sequence}: expected a positive number of processes")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all; the default is one alone. Every method is called by all of them together."""

    rank: int = 0
    world: int = 1
    sequence: int = 1
    sequence_group: distributed.ProcessGroup | None = None
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this one writes logs and checkpoints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of the samples this one computes."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """How many parts the samples are split into."""
        return self.world // self.sequence

    def share(self, numbers: range) -> range:
        """The contiguous part of a batch's sample numbers that this data rank computes.

        Raises ConfigError when the samples do not divide into equal parts.
        """
        if len(numbers) % self.data_size:
            raise ConfigError(
                f"a batch of {len(numbers)} samples: expected a multiple of the {self.data_size} "
                f"parts of {self.world} processes with sequence={self.sequence}"
            )
        part = len(numbers) // self.data_size
        return numbers[self.data_rank * part : (self.data_rank + 1) * part]

    def mean(self, value: float) -> float:
        """The mean over all processes of a number of each."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.average([total])
        return total.item()

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over all processes."""
        if self.world > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor.div_(self.world))

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            distributed.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def close(self) -> None:
        """Leave the group; a process may join another afterwards."""
        if not distributed.is_initialized():
            return
        known = sys.modules.get("deepspeed.comm")  # if DeepSpeed took part, it has to forget the group's parts
        (known if known and known.is_initialized() else distributed).destroy_process_group()


def join(config: ParallelConfig) -> Processes:
    """Join the launcher's processes, or stand alone.

    Raises ConfigError when the processes do not divide into sequence groups.
    """
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()  # what every launcher sets
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if launched and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if launched else (0, 1)
    if world % config.sequence:
        raise ConfigError(f"parallel.sequence={config.sequence}: expected a divisor of the {world} processes")
    group = None
    if config.sequence > 1:  # every process takes part in making every group
        starts = range(0, world, config.sequence)
        groups = [distributed.new_group(list(range(start, start + config.sequence))) for start in starts]
        group = groups[rank // config.sequence]
    return Processes(rank=rank, world=world, sequence=config.sequence, sequence_group=group, device=device)


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Parameters whole on every rank, for reading, where ZeRO-3 keeps parts of them. All ranks enter together."""
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not spread:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(spread)
    return gathered


def part(tensor: Tensor, rank: int, count: int) -> Tensor:
    """One of `count` equal parts of a tensor laid flat, the last ones filled up with zeros: as ZeRO-3 cuts, too."""
    length = -(-tensor.numel() // count)
    piece = tensor.flatten()[rank * length : (rank + 1) * length]
    return F.pad(piece, (0, length - len(piece)))
