"""What steers a world beside its prompt, and the branches through which it does.

A recipe chooses conditions by name. Each is a branch of its own that adds to what the backbone computes, at one
of three places (embedded tokens, time embedding, after every block), or, for PRoPE, beside every self-attention. What
it adds passes through weights that start at zero, so a backbone that gains a branch computes what it did before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minwm.errors import ConfigError, InputError
from minwm.geometry.actions import CLASSES
from minwm.models.context import attention
from minwm.models.layers import dtype_of, patchify, sinusoid
from minwm.models.prope import Cameras

ConditionName = Literal[
    "camera_prope",  # relative cameras inside self-attention (models/prope.py)
    "camera_plucker",  # Plücker rays of every latent pixel as extra input channels
    "camera_attention",  # cross-attention to tokens of the frame's camera motion
    "action_attention",  # cross-attention to tokens of the frame's discrete action
    "action_timestep",  # the discrete action's embedding added to the timestep's
    "first_image",  # the stream's first latent frame as extra input channels
]
TOKENS = 4  # that a frame's camera motion or action is spread over, for cross-attention
FREQUENCIES = 256


@dataclass(frozen=True)
class Conditions:
    """The signals of the frames of one pass; a backbone takes those that its branches ask for.

    actions: (b, f) int64, the 81 classes
    image:   (b, c + 1, y, x), latent of the stream's first frame and a channel of ones; zeros where there is none
    """

    cameras: Cameras | None = None
    actions: Tensor | None = None
    image: Tensor | None = None

    def __post_init__(self) -> None:
        labels = self.actions  # on a GPU they were checked before they went there; looking would wait for it
        if labels is not None and labels.device.type == "cpu" and labels.numel():
            low, high = (int(bound) for bound in labels.aminmax())
            if low < 0 or high >= CLASSES:
                raise InputError(f"actions: reach from {low} to {high}, expected labels of 0 to {CLASSES - 1}")

    def repeat_frames(self, times: int) -> "Conditions":
        """The same signals `times` over, one run of frames after the other."""
        cameras = None if self.cameras is None else self.cameras.repeat_frames(times)
        return Conditions(cameras, None if self.actions is None else self.actions.repeat(1, times), self.image)

    def frames(self, start: int, end: int) -> "Conditions":
        """Those of frames [start, end)."""
        cameras = None if self.cameras is None else self.cameras.frames(start, end)
        return Conditions(cameras, None if self.actions is None else self.actions[:, start:end], self.image)

    def streams(self, chosen: Tensor | slice) -> "Conditions":
        """Those of some of the batch's streams."""
        return Conditions(
            None if self.cameras is None else self.cameras.streams(chosen),
            None if self.actions is None else self.actions[chosen],
            None if self.image is None else self.image[chosen],
        )

    def to(self, device: torch.device | str) -> "Conditions":
        """The same signals on a device."""
        return Conditions(
            None if self.cameras is None else self.cameras.to(device),
            None if self.actions is None else self.actions.to(device),
            None if self.image is None else self.image.to(device),
        )


def first_image(latent: Tensor) -> Tensor:
    """`Conditions.image` of a first latent frame (b, c, y, x)."""
    return torch.cat([latent, torch.ones_like(latent[:, :1])], dim=1)


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The frames that a pass steers: batch, absolute indices, tokens' rows and columns."""

    batch: int
    positions: Sequence[int]
    rows: int
    columns: int

    def cameras(self, conditions: Conditions) -> Cameras:
        """The cameras. Raises InputError when there are none, or of other frames."""
        if conditions.cameras is None:
            raise InputError("cameras: are missing, the model is steered by them")
        self._require_shape("cameras", conditions.cameras.viewmats)
        return conditions.cameras

    def actions(self, conditions: Conditions) -> Tensor:
        """The action labels (b, f). Raises InputError when there are none, or of other frames."""
        if conditions.actions is None:
            raise InputError("actions: are missing, the model is steered by them")
        self._require_shape("actions", conditions.actions)
        return conditions.actions

    def image(self, conditions: Conditions, channels: int, patch: tuple[int, int]) -> Tensor | None:
        """`Conditions.image` where one of the frames is the stream's first. Raises InputError for a wrong shape."""
        image = conditions.image
        if image is None or 0 not in self.positions:
            return None
        expected = (self.batch, channels + 1, self.rows * patch[0], self.columns * patch[1])
        if image.shape != expected:
            raise InputError(f"image: has shape {tuple(image.shape)}, expected {expected}")
        return image

    def _require_shape(self, name: str, signal: Tensor) -> None:
        expected = (self.batch, len(self.positions))
        if signal.shape[:2] != expected:
            raise InputError(
                f"{name}: are of {tuple(signal.shape[:2])} streams and frames, expected {expected} as the latents"
            )


@dataclass(frozen=True, kw_only=True)
class BranchSizes:
    """What a branch needs to know of its backbone. swap_sides: its labels number left and right the other way round."""

    dim: int
    heads: int
    layers: int
    channels: int
    patch: tuple[int, int]
    swap_sides: bool = False


class _Plucker(nn.Module):
    """Rays of every latent pixel, through extra input channels of the patch embedding.

    A ray is (moment, direction) in the coordinates of the frame before: local, so that it means the same after hours.
    """

    def __init__(self, sizes: BranchSizes) -> None:
        super().__init__()
        self.patch = sizes.patch
        self.input = _zero(nn.Linear(6 * sizes.patch[0] * sizes.patch[1], sizes.dim, bias=False))

    def tokens(self, conditions: Conditions, frames: Frames) -> Tensor:
        rays = plucker_rays(frames.cameras(conditions), frames.rows * self.patch[0], frames.columns * self.patch[1])
        return self.input(patchify(rays, self.patch).to(dtype_of(self.input)))  # type: ignore[no-any-return]


class _FirstImage(nn.Module):
    """The stream's first latent frame and a mask, through extra input channels of the patch embedding."""

    def __init__(self, sizes: BranchSizes) -> None:
        super().__init__()
        self.patch, self.channels = sizes.patch, sizes.channels
        self.input = _zero(nn.Linear((sizes.channels + 1) * sizes.patch[0] * sizes.patch[1], sizes.dim, bias=False))

    def tokens(self, conditions: Conditions, frames: Frames) -> Tensor | None:
        image = frames.image(conditions, self.channels, self.patch)
        if image is None:
            return None
        added = self.input(patchify(image[:, None], self.patch).to(dtype_of(self.input)))
        first = torch.tensor([position == 0 for position in frames.positions], device=added.device)
        return added * first[:, None, None]  # type: ignore[no-any-return]


class _ActionTimestep(nn.Module):
    """The label as a second timestep: sinusoid and MLP, added to the time embedding."""

    def __init__(self, sizes: BranchSizes) -> None:
        super().__init__()
        self.swap_sides = sizes.swap_sides
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, sizes.dim), nn.SiLU(), _zero(nn.Linear(sizes.dim, sizes.dim)))

    def time(self, conditions: Conditions, frames: Frames) -> Tensor:
        """(b, f, dim)."""
        labels = sinusoid(_numbered(frames.actions(conditions), self.swap_sides), FREQUENCIES)
        return self.mlp(labels.to(dtype_of(self.mlp)))  # type: ignore[no-any-return]


class _FrameAttention(nn.Module):
    """Tokens of a frame look at a few tokens that say how the camera moved to it, or what was done."""

    def __init__(self, sizes: BranchSizes, read: nn.Module) -> None:
        super().__init__()
        self.read = read
        self.layers = nn.ModuleList(_Look(sizes.dim, sizes.heads) for _ in range(sizes.layers))

    def signal(self, conditions: Conditions, frames: Frames) -> Tensor:
        """(b, f, TOKENS, dim)."""
        return self.read(conditions, frames)  # type: ignore[no-any-return]

    def after_block(self, layer: int, x: Tensor, signal: Tensor) -> Tensor:
        """What is added to x (b, f, n, dim)."""
        return self.layers[layer](x, signal)  # type: ignore[no-any-return]


class _Look(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.o = _zero(nn.Linear(dim, dim))

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        q = self.q(self.norm(x))
        q, k, v = (y.flatten(0, 1).unflatten(-1, (self.heads, -1)) for y in (q, self.k(signal), self.v(signal)))
        return self.o(attention(q, k, v).flatten(2)).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]


class _ReadMotion(nn.Module):
    """Camera motion since the frame before (rotation less the identity, translation) and focal lengths, to tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(14, dim), nn.SiLU(), nn.Linear(dim, TOKENS * dim))

    def forward(self, conditions: Conditions, frames: Frames) -> Tensor:
        cameras = frames.cameras(conditions)
        turn = cameras.motions[..., :3, :3] - torch.eye(3, device=cameras.motions.device)
        focal = cameras.intrinsics[:, None, :2].log().expand(-1, turn.shape[1], -1)
        read = torch.cat([turn.flatten(2), cameras.motions[..., :3, 3], focal], dim=-1)
        return self.mlp(read.to(dtype_of(self.mlp))).unflatten(-1, (TOKENS, -1))  # type: ignore[no-any-return]


class _ReadAction(nn.Module):
    """A discrete action to tokens."""

    def __init__(self, dim: int, swap_sides: bool) -> None:
        super().__init__()
        self.swap_sides = swap_sides
        self.embedding = nn.Embedding(CLASSES, TOKENS * dim)

    def forward(self, conditions: Conditions, frames: Frames) -> Tensor:
        labels = _numbered(frames.actions(conditions), self.swap_sides)
        return self.embedding(labels).unflatten(-1, (TOKENS, -1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Steering:
    """What the branches add in one pass: to tokens (b, f, n, dim), to time (b, f, dim), and signals for the blocks."""

    tokens: tuple[Tensor, ...]
    time: tuple[Tensor, ...]
    signals: tuple[tuple[_FrameAttention, Tensor], ...]

    def onto_tokens(self, x: Tensor) -> Tensor:
        """Embedded tokens (b, f, n, dim) with what the branches add to them."""
        return sum(self.tokens, x)

    def onto_time(self, e: Tensor) -> Tensor:
        """Time embeddings (b, f, dim) with what the branches add to them."""
        return sum(self.time, e)

    def after_block(self, layer: int, x: Tensor) -> Tensor:
        """x (b, f, n, dim) with what the branches add after block `layer`."""
        for branch, signal in self.signals:
            x = x + branch.after_block(layer, x, signal)
        return x


class ConditionBranches(nn.ModuleDict):
    """The branches of a backbone by name, PRoPE's apart: that one is part of the backbone's self-attention."""

    def __init__(self, names: Sequence[ConditionName], sizes: BranchSizes) -> None:
        make: dict[ConditionName, Callable[[], nn.Module]] = {
            "camera_plucker": lambda: _Plucker(sizes),
            "camera_attention": lambda: _FrameAttention(sizes, _ReadMotion(sizes.dim)),
            "action_attention": lambda: _FrameAttention(sizes, _ReadAction(sizes.dim, sizes.swap_sides)),
            "action_timestep": lambda: _ActionTimestep(sizes),
            "first_image": lambda: _FirstImage(sizes),
        }
        super().__init__({name: make[name]() for name in names if name in make})

    def steer(self, conditions: Conditions | None, frames: Frames) -> Steering:
        """Read the signals. Raises InputError for those that are missing or of another shape."""
        conditions = conditions or Conditions()
        branches = list(self.values())
        inputs = (
            branch.tokens(conditions, frames) for branch in branches if isinstance(branch, _Plucker | _FirstImage)
        )
        return Steering(
            tokens=tuple(added for added in inputs if added is not None),
            time=tuple(branch.time(conditions, frames) for branch in branches if isinstance(branch, _ActionTimestep)),
            signals=tuple(
                (branch, branch.signal(conditions, frames))
                for branch in branches
                if isinstance(branch, _FrameAttention)
            ),
        )


def require_known(names: Sequence[str]) -> None:
    """Raise ConfigError for a condition that is unknown or named twice."""
    for name in names:
        if name not in get_args(ConditionName) or names.count(name) > 1:
            known = ", ".join(get_args(ConditionName))
            raise ConfigError(f"conditions: {list(names)}: {name!r}: expected each at most once, of {known}")


def plucker_rays(cameras: Cameras, rows: int, columns: int) -> Tensor:
    """Rays (b, f, 6, rows, columns) through the centres of latent pixels: moment o × d and unit direction d.

    In the coordinates of the frame before, from its motion: origin o, direction R·((u − cx)/fx, (v − cy)/fy, 1).
    """
    with torch.autocast(cameras.intrinsics.device.type, enabled=False):
        return _rays(cameras, rows, columns)


def _rays(cameras: Cameras, rows: int, columns: int) -> Tensor:
    fx, fy, cx, cy = cameras.intrinsics[:, :, None, None].unbind(1)
    device = cameras.intrinsics.device
    v, u = torch.meshgrid(
        (torch.arange(rows, device=device) + 0.5) / rows,
        (torch.arange(columns, device=device) + 0.5) / columns,
        indexing="ij",
    )
    pixels = torch.stack([(u - cx) / fx, (v - cy) / fy, torch.ones_like(u).expand(len(fx), -1, -1)], dim=1)
    turn, origin = cameras.motions[..., :3, :3], cameras.motions[..., :3, 3]
    directions = F.normalize(torch.einsum("bfij,bjyx->bfiyx", turn, pixels), dim=2)
    moments = torch.linalg.cross(origin[..., None, None].expand_as(directions), directions, dim=2)
    return torch.cat([moments, directions], dim=2)


def _numbered(labels: Tensor, swap_sides: bool) -> Tensor:
    """Labels as the weights number them: left moves have odd numbers of translation from 3 on, right ones the next."""
    if not swap_sides:
        return labels
    translation = labels // 9
    return torch.where(translation >= 3, labels + 9 * (2 * (translation % 2) - 1), labels)


def _zero(linear: nn.Linear) -> nn.Linear:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear
