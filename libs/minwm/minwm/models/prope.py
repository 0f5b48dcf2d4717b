"""PRoPE: attention that sees relative cameras (Li et al. 2025, arXiv 2507.10496), as minWM uses it.

With P = lift(K)·viewmat per frame, q is mapped by Pᵀ, k and v by P⁻¹, and the attention's output by P:
the logit between tokens i and j is qᵢᵀ Pᵢ Pⱼ⁻¹ kⱼ, so only relative cameras matter. A head's channels are
taken in groups of four. K keeps fx and fy (normalised by image size), its centre is set to zero.
Matrices are made once per frame and applied per frame, in float32. Attention by position (RoPE) and by
camera run as one call over twice the heads.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minwm.errors import InputError
from minwm.models.context import Beside, Context
from minwm.models.rope import rotate


@dataclass(frozen=True)
class Projection:
    """P and P⁻¹, each (b, f, 4, 4) float32."""

    matrix: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class Cameras:
    """viewmats (b, f, 4, 4) world to camera, intrinsics (b, 4) fx fy cx cy, motions (b, f, 4, 4); float32.

    motions: pose of each frame's camera in the coordinates of the frame before it
    """

    viewmats: Tensor
    intrinsics: Tensor
    motions: Tensor

    @classmethod
    def track(cls, viewmats: Tensor, intrinsics: Tensor, before: Tensor | None = None) -> "Cameras":
        """Cameras of frames that follow each other; `before` (b, 4, 4) is the viewmat of the frame before the first.

        Without it the first frame is at rest. Raises InputError for wrong shapes, poses that are not finite,
        and focal lengths that are not positive.
        """
        _require_cameras(viewmats, intrinsics)
        first = viewmats[:, :1] if before is None else before[:, None].to(viewmats)
        if first.shape != viewmats[:, :1].shape or not first.isfinite().all():
            raise InputError(f"before: expected a finite viewmat (4, 4) for each of the {len(viewmats)} streams")
        return cls(viewmats, intrinsics, _product(torch.cat([first, viewmats[:, :-1]], dim=1), invert(viewmats)))

    @cached_property
    def projection(self) -> Projection:
        """P and P⁻¹ of every frame, computed once, without gradient; the inverse is analytic (viewmats are rigid)."""
        with torch.inference_mode(False):  # whoever asks first, training may use it
            viewmats, intrinsics = self.viewmats.detach().float(), self.intrinsics.detach().float()
            focal = intrinsics[:, None, :2].expand(-1, viewmats.shape[1], -1)
            scale = torch.cat([focal, torch.ones_like(focal)], dim=-1)
            return Projection(scale[..., :, None] * viewmats, invert(viewmats) / scale[..., None, :])

    def repeat_frames(self, times: int) -> "Cameras":
        """The same cameras `times` over, one run after the other."""
        return Cameras(self.viewmats.repeat(1, times, 1, 1), self.intrinsics, self.motions.repeat(1, times, 1, 1))

    def frames(self, start: int, end: int) -> "Cameras":
        """Frames [start, end)."""
        return Cameras(self.viewmats[:, start:end], self.intrinsics, self.motions[:, start:end])

    def streams(self, chosen: Tensor | slice) -> "Cameras":
        """Those of some of the batch's streams."""
        return Cameras(self.viewmats[chosen], self.intrinsics[chosen], self.motions[chosen])

    def to(self, device: torch.device | str) -> "Cameras":
        """The same cameras on a device."""
        return Cameras(self.viewmats.to(device), self.intrinsics.to(device), self.motions.to(device))


def _require_cameras(viewmats: Tensor, intrinsics: Tensor) -> None:
    b = viewmats.shape[0]
    if viewmats.ndim != 4 or viewmats.shape[2:] != (4, 4):
        raise InputError(f"viewmats have shape {tuple(viewmats.shape)}, expected (batch, frames, 4, 4)")
    if intrinsics.shape != (b, 4):
        raise InputError(f"intrinsics have shape {tuple(intrinsics.shape)}, expected ({b}, 4): fx fy cx cy per stream")
    finite = viewmats.isfinite().all(-1).all(-1)
    if not finite.all():
        stream, frame = (~finite).nonzero()[0].tolist()
        raise InputError(f"viewmats[{stream}, {frame}]: is not finite: {viewmats[stream, frame].tolist()}")
    good = intrinsics.isfinite().all(-1) & (intrinsics[:, :2] > 0).all(-1)
    if not good.all():
        stream = int((~good).nonzero()[0])
        raise InputError(f"intrinsics[{stream}]: {intrinsics[stream].tolist()}: expected finite values and fx, fy > 0")


def invert(rigid: Tensor) -> Tensor:
    """The inverse of rigid motions (…, 4, 4)."""
    back = rigid[..., :3, :3].transpose(-1, -2)
    inverse = rigid.clone()
    inverse[..., :3, :3] = back
    inverse[..., :3, 3:] = -_product(back, rigid[..., :3, 3:])
    return inverse


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in the tensors' own precision, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def transform(x: Tensor, matrix: Tensor) -> Tensor:
    """Map tokens x (b, n, h, d) of f frames, in groups of four channels, by (b, f, 4, 4); float32."""
    b, f = matrix.shape[:2]
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x.float().reshape(b * f, -1, 4), matrix.mT.reshape(b * f, 4, 4)).reshape(x.shape)


def attend(
    context: Context,
    layer: int,
    qkv: tuple[Tensor, Tensor, Tensor],
    rotation: Tensor,
    camera: Projection | None,
    beside: Beside | None = None,
    *,
    past_by_position: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention by position and, where there are cameras, by camera; each (b, n, h, d).

    qkv: (b, n, h, d) each, normalised, not yet rotated: q and k in float32, v in the dtype to attend in.
    past_by_position: the branch by camera sees a cache's past as the branch by position left it (rotated, not
        projected), and the cache keeps half as much: how minWM's HunyuanVideo rolls out
    """
    context.keep(layer, *qkv[1:])
    placed = place(qkv, rotation, camera)
    if camera is None or not past_by_position:
        return leave(context.attend(layer, *placed, beside), camera)
    (placed_q, seen_q), (placed_k, seen_k), (placed_v, seen_v) = (x.chunk(2, dim=2) for x in placed)
    seen = context.attend(layer, seen_q, seen_k, seen_v, beside)
    # the second to write, so that later chunks find keys as they are placed
    by_position = context.attend(layer, placed_q, placed_k, placed_v, beside)
    return leave(torch.cat([by_position, seen], dim=2), camera)


def place(
    qkv: tuple[Tensor, Tensor, Tensor], rotation: Tensor, camera: Projection | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they attend, in v's dtype: by position and, on as many heads more, by camera."""
    q, k, v = qkv
    dtype = v.dtype
    placed_q, placed_k = rotate(q, rotation).to(dtype), rotate(k, rotation).to(dtype)
    if camera is None:
        return placed_q, placed_k, v
    seen_q, seen_k, seen_v = transform(q, camera.matrix.mT), transform(k, camera.inverse), transform(v, camera.inverse)
    pairs = (placed_q, seen_q), (placed_k, seen_k), (v, seen_v)
    q, k, v = (torch.cat([by_position, by_camera.to(dtype)], dim=2) for by_position, by_camera in pairs)
    return q, k, v


def leave(read: Tensor, camera: Projection | None) -> tuple[Tensor, Tensor | None]:
    """What was read by position, and by camera where there are cameras, from the attention of what was placed."""
    if camera is None:
        return read, None
    placed, seen = read.chunk(2, dim=2)
    return placed, transform(seen, camera.matrix).to(read.dtype)
