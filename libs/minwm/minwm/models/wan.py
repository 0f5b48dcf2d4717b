"""The Wan 2.1 video transformer.

One class for every use: bidirectional, teacher-forced or cached is the attention context's business.
Latents (b, f, c, y, x) and one timestep per latent frame go in, the flow velocity comes out. Module
names are those of the official checkpoints. Facts: Wan technical report (arXiv 2503.20314).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minwm.errors import ConfigError, InputError
from minwm.models import prope
from minwm.models.cache import CacheGeometry
from minwm.models.conditions import (
    BranchSizes,
    ConditionBranches,
    ConditionName,
    Conditions,
    Frames,
    require_known,
)
from minwm.models.context import Context, History, attention
from minwm.models.layers import RMSNorm, patchify, sinusoid, unpatchify
from minwm.models.rope import Axes, rotations
from minwm.models.text import BYTE_VOCABULARY, Embedded
from minwm.models.transformer import Transformer, require_batch, require_length


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes. With `byte_text` prompts are bytes, embedded here and trained with the model."""

    kind: Literal["wan"] = "wan"
    dim: int
    layers: int
    heads: int
    ffn_dim: int
    channels: int = 16
    patch: tuple[int, int] = (2, 2)
    frequencies: int = 256
    text_dim: int = 4096
    text_length: int = 512
    byte_text: bool = False
    eps: float = 1e-6
    conditions: tuple[ConditionName, ...] = ()

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 4:
            raise ConfigError(f"dim={self.dim}, heads={self.heads}: expected a head size that is a whole multiple of 4")
        require_known(self.conditions)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads

    @property
    def axes(self) -> Axes:
        """Row and column take 2·⌊d/6⌋ channels of a head each, the frame the rest: 44, 42, 42 of 128."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    def cache_geometry(self, rows: int, columns: int, history: History) -> CacheGeometry:
        """What a stream of latents of rows × columns keeps."""
        branches = 2 if "camera_prope" in self.conditions else 1
        return CacheGeometry(
            layers=self.layers,
            heads=self.heads * branches,
            branches=branches,
            head_dim=self.head_dim,
            tokens_per_frame=(rows // self.patch[0]) * (columns // self.patch[1]),
            history=history,
        )


@dataclass(frozen=True)
class WanPrompt:
    """A prompt's cross-attention keys and values, one pair (b, l, h, d) per layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    def detach(self) -> "WanPrompt":
        """The same, without gradient."""
        return WanPrompt(tuple((k.detach(), v.detach()) for k, v in self.layers))


@dataclass(frozen=True)
class Step:
    """What every block of one pass shares."""

    context: Context
    rotation: Tensor
    camera: prope.Projection | None


class SelfAttention(nn.Module):
    """By position and, with the condition `camera_prope`, by camera."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, config.eps) for _ in range(2))
        if "camera_prope" in config.conditions:
            self.prope_o = nn.Linear(config.dim, config.dim)
            nn.init.zeros_(self.prope_o.weight)
            nn.init.zeros_(self.prope_o.bias)

    def forward(self, x: Tensor, layer: int, step: Step) -> Tensor:
        """x (b, f·n, dim) to (b, f·n, dim)."""
        v = self.v(x).unflatten(-1, (self.heads, -1))
        q, k = (y.unflatten(-1, (self.heads, -1)) for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x))))
        by_position, by_camera = prope.attend(step.context, layer, (q, k, v), step.rotation, step.camera)
        if by_camera is None:
            return self.o(by_position.flatten(2))  # type: ignore[no-any-return]
        out = F.linear(by_position.flatten(2), self.o.weight, self.o.bias + self.prope_o.bias)
        return out + F.linear(by_camera.flatten(2), self.prope_o.weight)


class CrossAttention(nn.Module):
    """Image tokens look at the prompt, whose keys and values are made once."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, config.eps) for _ in range(2))

    def prompt(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, l, h, d) of embedded text (b, l, dim)."""
        v = self.v(text)
        k = self.norm_k(self.k(text)).to(v.dtype)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, prompt: tuple[Tensor, Tensor]) -> Tensor:
        """x (b, s, dim) to (b, s, dim)."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1)).to(prompt[0].dtype)
        return self.o(attention(q, *prompt).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; modulated by the timestep, frame by frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, e0: Tensor, prompt: tuple[Tensor, Tensor], layer: int, step: Step) -> Tensor:
        """x (b, f, n, dim), e0 (b, f, 6, dim) to (b, f, n, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e0).unsqueeze(3).unbind(2)
        frames = x.shape[1]
        y = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        read = self.self_attn(y.flatten(1, 2), layer, step).unflatten(1, (frames, -1))
        x = torch.addcmul(x, gate1, read)
        x = x + self.cross_attn(self.norm3(x).flatten(1, 2), prompt).unflatten(1, (frames, -1))
        return torch.addcmul(x, gate2, self.ffn(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class Head(nn.Module):
    """Tokens to patches of velocity; modulated by the bare time embedding."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.patch[0] * config.patch[1] * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (b, f, n, dim), e (b, f, dim) to (b, f, n, patch channels)."""
        shift, scale = (self.modulation + e.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class Wan(Transformer):
    """The transformer."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.config = config
        dim = config.dim
        if config.byte_text:
            self.byte_embedding = nn.Embedding(BYTE_VOCABULARY, config.text_dim, padding_idx=0)
        self.patch_embedding = nn.Conv3d(config.channels, dim, (1, *config.patch), (1, *config.patch))
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        sizes = BranchSizes(
            dim=dim, heads=config.heads, layers=config.layers, channels=config.channels, patch=config.patch
        )
        self.conditions = ConditionBranches(config.conditions, sizes)

    def prompt(self, text: Tensor | Embedded, *, bidirectional: bool = False) -> WanPrompt:
        """A prompt's keys and values, the same for every context.

        text: bytes (b, l) int64, 0 where there is none, if `byte_text`; else embeddings of `text_dim`.
        Shorter ones are padded with zeros, which are attended to. Raises InputError for longer ones.
        """
        embedded = self.text_embedding(self._padded(text))
        layers = [cast(Block, block).cross_attn.prompt(embedded) for block in self.blocks]
        return WanPrompt(tuple(layers))

    def _padded(self, text: Tensor | Embedded) -> Tensor:
        """(b, text_length, text_dim)."""
        config = self.config
        if isinstance(text, Embedded) == config.byte_text:
            expected = "bytes (b, l)" if config.byte_text else f"embeddings of {config.text_dim} channels"
            raise InputError(f"prompt: is {type(text).__name__}, the model takes {expected}")
        if isinstance(text, Tensor):
            require_length("prompt", text.shape[1], config.text_length)
            states = self.byte_embedding(text)
        else:
            require_length("prompt", text.states.shape[1], config.text_length)
            if text.states.shape[-1] != config.text_dim:
                raise InputError(f"prompt: has {text.states.shape[-1]} channels, expected {config.text_dim}")
            states = text.zeroed().to(self._dtype)
        return F.pad(states, (0, 0, 0, config.text_length - states.shape[1]))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt: WanPrompt,
        context: Context,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Velocity (b, f, c, y, x) of latents (b, f, c, y, x) at timesteps (b, f) in [0, 1000]."""
        config, conditions = self.config, conditions or Conditions()
        rows, columns = self.grid(latents, timesteps, context)
        if not isinstance(prompt, WanPrompt):
            raise InputError(f"prompt: is {type(prompt).__name__}, expected what this model's `prompt` made")
        require_batch(len(prompt.layers[0][0]), len(latents))
        frames = Frames(batch=len(latents), positions=context.positions, rows=rows, columns=columns)
        by_camera = "camera_prope" in config.conditions
        step = Step(
            context=context,
            rotation=self.rotation(context.streams, rows, columns, latents.device),
            camera=frames.cameras(conditions).projection if by_camera else None,
        )
        return self.velocity(latents, timesteps, prompt, step, conditions, frames)

    def velocity(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt: WanPrompt,
        step: Step,
        conditions: Conditions,
        frames: Frames,
    ) -> Tensor:
        """`forward` of what is checked, with places and cameras as tensors."""
        config = self.config
        steering = self.conditions.steer(conditions, frames)
        x = steering.onto_tokens(self._embed_patches(latents))
        e = steering.onto_time(self.time_embedding(sinusoid(timesteps, config.frequencies).to(self._dtype)))
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        for layer, (block, text) in enumerate(zip(self.blocks, prompt.layers, strict=True)):
            x = steering.after_block(layer, self.run(block, x, e0, text, layer, step))
        return unpatchify(self.head(x, e), config.patch, frames.rows, frames.columns)

    def rotation(self, streams: Sequence[Sequence[int]], rows: int, columns: int, device: torch.device) -> Tensor:
        """See Transformer."""
        return rotations(streams, rows, columns, self.config.axes, device)

    @property
    def _dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def _embed_patches(self, latents: Tensor) -> Tensor:
        """(b, f, c, y, x) to tokens (b, f, n, dim): the patch convolution as one matrix product."""
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patchify(latents, self.config.patch).to(self._dtype), weight, self.patch_embedding.bias)
