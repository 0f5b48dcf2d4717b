"""Layers that backbones share: patches, timestep sinusoids, and a norm that keeps its precision."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Over the last axis, computed and returned in float32: rotations and projections that follow are in it too."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x, float32 or better."""
        with torch.autocast(x.device.type, enabled=False):
            precision = torch.promote_types(x.dtype, torch.float32)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precision)
            scale = torch.rsqrt(norm.square() / x.shape[-1] + self.eps)
            return x * scale * self.weight.to(precision)


def dtype_of(module: nn.Module) -> torch.dtype:
    """That of the module's weights."""
    return next(module.parameters()).dtype


def patchify(latents: Tensor, patch: tuple[int, int]) -> Tensor:
    """(b, f, c, y, x) to (b, f, n, c · patch), ordered as a convolution's flattened weight is."""
    b, f, c, y, x = latents.shape
    high, wide = patch
    patches = latents.reshape(b, f, c, y // high, high, x // wide, wide)
    return patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, f, -1, c * high * wide)


def unpatchify(tokens: Tensor, patch: tuple[int, int], rows: int, columns: int) -> Tensor:
    """(b, f, rows · columns, patch · c) to (b, f, c, y, x); a token's channels are ordered patch first."""
    b, f = tokens.shape[:2]
    high, wide = patch
    grid = tokens.reshape(b, f, rows, columns, high, wide, -1)
    return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, -1, rows * high, columns * wide)


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Values (…) to (…, width): cosines, then sines, of wavelengths up to 2π·10000, in float64."""
    exponent = torch.arange(width // 2, dtype=torch.float64, device=values.device) / (width // 2)
    angles = values.double()[..., None] * 10000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
