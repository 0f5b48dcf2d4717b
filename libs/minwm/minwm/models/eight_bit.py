"""Linear layers whose products have eight bits: FP8 (E4M3), which Hopper GPUs multiply at twice bf16's rate.

Weights are rounded once, with a scale for each output; inputs at every call, with a scale for each token. Elsewhere
PyTorch computes the same numbers, slowly. arXiv:2209.05433 describes the format.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minwm.errors import ConfigError

_FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FORMAT).max
_MULTIPLE = 16  # of inputs and of outputs, which the GPU's kernels need
_SMALLEST_SCALE = 1e-12


class EightBitLinear(nn.Module):
    """A linear layer for passes without gradient: (…, in) to (…, out) of the input's type.

    Each factor is right to a sixteenth, so a sum of many random terms is off by about 4 % of its size.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        """Raises ConfigError for numbers of inputs or outputs that are no multiples of 16."""
        super().__init__()
        if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
            raise ConfigError(
                f"eight bits: a layer of {layer.in_features} to {layer.out_features}, expected multiples of {_MULTIPLE}"
            )
        weight, scale = _rounded(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _rounded(x.reshape(-1, x.shape[-1]))
        each = F.ScalingType.RowWise
        product = F.scaled_mm(rows, self.weight.t(), scale, each, self.scale.t(), each, output_dtype=torch.bfloat16)
        return (product + self.bias).to(x.dtype).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, k) in eight bits, and what to multiply them by, float32 (n, 1)."""
    wide = rows.float()
    scale = (wide.abs().amax(1, keepdim=True) / _LARGEST).clamp_min(_SMALLEST_SCALE)
    return (wide / scale).to(_FORMAT), scale
