"""PRoPE: attention that sees relative cameras (Li et al. 2025, arXiv 2507.10496), as minWM uses it.

With P = lift(K)·viewmat per frame, q is mapped by Pᵀ, k and v by P⁻¹, and the attention's output by P:
the logit between tokens i and j is qᵢᵀ Pᵢ Pⱼ⁻¹ kⱼ, so only relative cameras matter. A head's channels are
taken in groups of four. K keeps fx and fy (normalised by image size), its centre is set to zero.
Matrices are made once per frame and applied per frame, in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """viewmats (b, f, 4, 4) world to camera, intrinsics (b, 4) fx fy cx cy; float32."""

    viewmats: Tensor
    intrinsics: Tensor

    def repeat_frames(self, times: int) -> "Cameras":
        """The same cameras `times` over, one run after the other."""
        return Cameras(self.viewmats.repeat(1, times, 1, 1), self.intrinsics)

    def frames(self, start: int, end: int) -> "Cameras":
        """Frames [start, end)."""
        return Cameras(self.viewmats[:, start:end], self.intrinsics)


@dataclass(frozen=True)
class Projection:
    """P and P⁻¹, each (b, f, 4, 4) float32."""

    matrix: Tensor
    inverse: Tensor


def projection(cameras: Cameras) -> Projection:
    """P and P⁻¹ of every frame; the inverse is analytic (viewmats are rigid)."""
    viewmats = cameras.viewmats.float()
    focal = cameras.intrinsics[:, None, :2].float().expand(-1, viewmats.shape[1], -1)
    scale = torch.cat([focal, torch.ones_like(focal)], dim=-1)
    rotation, translation = viewmats[..., :3, :3], viewmats[..., :3, 3:]
    back = rotation.transpose(-1, -2)
    inverse = viewmats.clone()
    inverse[..., :3, :3] = back
    inverse[..., :3, 3:] = -back @ translation
    return Projection(scale[..., :, None] * viewmats, inverse / scale[..., None, :])


def transform(x: Tensor, matrix: Tensor) -> Tensor:
    """Map tokens x (b, n, h, d) of f frames, in groups of four channels, by (b, f, 4, 4), in float32."""
    b, f = matrix.shape[:2]
    with torch.autocast(x.device.type, enabled=False):
        mapped = x.float().reshape(b, f, -1, 4) @ matrix.transpose(-1, -2)
    return mapped.reshape(x.shape).to(x.dtype)
