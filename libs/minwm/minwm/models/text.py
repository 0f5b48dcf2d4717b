"""Prompts as a backbone takes them: embeddings with a mask, or bytes for presets that embed text themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minwm.errors import InputError

BYTE_VOCABULARY = 257  # 0 is "no byte"; byte b is b + 1


@dataclass(frozen=True)
class Embedded:
    """What an encoder made of a batch: states (b, l, c), and which of them are real, mask (b, l) bool."""

    states: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.states.ndim != 3 or self.mask.shape != self.states.shape[:2] or self.mask.dtype != torch.bool:
            raise InputError(
                f"prompt: has states {tuple(self.states.shape)} and a mask {tuple(self.mask.shape)} of "
                f"{self.mask.dtype}, expected (b, l, c), and (b, l) of torch.bool"
            )

    def zeroed(self) -> Tensor:
        """The states with zeros where they are not real, whatever lies there."""
        return self.states.masked_fill(~self.mask[..., None], 0)


def byte_tokens(prompts: Sequence[str], length: int) -> Tensor:
    """(b, length) int64: each prompt's UTF-8 bytes, padded with 0. Raises InputError for one that is longer."""
    rows = [[byte + 1 for byte in prompt.encode()] for prompt in prompts]
    for number, row in enumerate(rows):
        if len(row) > length:
            raise InputError(f"prompt[{number}]: has {len(row)} bytes, expected at most {length}")
    return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
