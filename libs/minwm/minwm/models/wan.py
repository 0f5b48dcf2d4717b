"""The Wan 2.1 video transformer, with camera control by PRoPE.

One class for every use: bidirectional, teacher-forced or cached is the attention context's business.
Latents (b, f, c, y, x) and one timestep per latent frame go in, the flow velocity comes out. Module
names are those of the official checkpoints. Facts: Wan technical report (arXiv 2503.20314).
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minwm.errors import ConfigError
from minwm.models.cache import CacheGeometry
from minwm.models.context import Context, History, attention
from minwm.models.prope import Cameras, Projection, projection, transform
from minwm.models.rope import rotate, rotation
from minwm.models.text import BYTE_VOCABULARY

BRANCHES = 2  # every head attends twice: by position (RoPE) and by camera (PRoPE)


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes. With `byte_text` prompts are bytes, embedded here and trained with the model."""

    dim: int
    layers: int
    heads: int
    ffn_dim: int
    channels: int = 16
    patch: tuple[int, int] = (2, 2)
    frequencies: int = 256
    text_dim: int = 128
    text_length: int = 64
    byte_text: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 4:
            raise ConfigError(f"dim={self.dim}, heads={self.heads}: expected a head size that is a whole multiple of 4")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads

    def tokens_per_frame(self, rows: int, columns: int) -> int:
        """Tokens of one latent frame of rows × columns."""
        return (rows // self.patch[0]) * (columns // self.patch[1])

    def cache_geometry(self, rows: int, columns: int, history: History, *, cameras: bool = True) -> CacheGeometry:
        """What a stream of rows × columns latents keeps; one that is run without cameras keeps half."""
        return CacheGeometry(
            layers=self.layers,
            heads=(BRANCHES if cameras else 1) * self.heads,
            head_dim=self.head_dim,
            tokens_per_frame=self.tokens_per_frame(rows, columns),
            history=history,
        )


@dataclass(frozen=True)
class Prompt:
    """A prompt's cross-attention keys and values, one pair (b, l, h, d) per layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    def detach(self) -> "Prompt":
        """The same, without gradient."""
        return Prompt(tuple((k.detach(), v.detach()) for k, v in self.layers))


@dataclass(frozen=True)
class _Step:
    """What every block of one pass shares."""

    context: Context
    rotation: Tensor
    projection: Projection | None


class RMSNorm(nn.RMSNorm):
    """Over all channels, before heads are split; in the weights' precision also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return super().forward(x.to(self.weight.dtype))


class SelfAttention(nn.Module):
    """RoPE and PRoPE attention as one call over twice the heads."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(config.dim, config.eps) for _ in range(2))
        self.prope_o = nn.Linear(config.dim, config.dim)
        nn.init.zeros_(self.prope_o.weight)
        nn.init.zeros_(self.prope_o.bias)

    def forward(self, x: Tensor, layer: int, step: _Step) -> Tensor:
        """x (b, f·n, dim) to (b, f·n, dim). Without cameras the PRoPE branch is skipped."""
        v = self.v(x).unflatten(-1, (self.heads, -1))
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1)).to(v.dtype)
        k = self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)).to(v.dtype)
        rotated_q, rotated_k = rotate(q, step.rotation), rotate(k, step.rotation)
        camera = step.projection
        if camera is None:
            return self.o(step.context.attend(layer, rotated_q, rotated_k, v).flatten(2))  # type: ignore[no-any-return]
        out = step.context.attend(
            layer,
            torch.cat([rotated_q, transform(q, camera.matrix.transpose(-1, -2))], dim=2),
            torch.cat([rotated_k, transform(k, camera.inverse)], dim=2),
            torch.cat([v, transform(v, camera.inverse)], dim=2),
        )
        by_position, by_camera = out.split(self.heads, dim=2)
        by_camera = transform(by_camera, camera.matrix)
        return self.o(by_position.flatten(2)) + self.prope_o(by_camera.flatten(2))  # type: ignore[no-any-return]


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

    def forward(self, x: Tensor, e0: Tensor, prompt: tuple[Tensor, Tensor], layer: int, step: _Step) -> Tensor:
        """x (b, f, n, dim), e0 (b, f, 6, dim) to (b, f, n, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e0).unsqueeze(3).unbind(2)
        frames = x.shape[1]
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(y.flatten(1, 2), layer, step).unflatten(1, (frames, -1))
        x = x + self.cross_attn(self.norm3(x).flatten(1, 2), prompt).unflatten(1, (frames, -1))
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


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


class Wan(nn.Module):
    """The transformer."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
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

    def prompt(self, text: Tensor) -> Prompt:
        """A prompt's keys and values.

        text: bytes (b, l) int64, 0 where there is none, if `byte_text`; else embeddings (b, l, text_dim).
        """
        embedded = self.byte_embedding(text) if self.config.byte_text else text
        embedded = self.text_embedding(embedded)
        layers = [cast(Block, block).cross_attn.prompt(embedded) for block in self.blocks]
        return Prompt(tuple(layers))

    def forward(
        self, latents: Tensor, timesteps: Tensor, prompt: Prompt, context: Context, cameras: Cameras | None = None
    ) -> Tensor:
        """Velocity (b, f, c, y, x) of latents (b, f, c, y, x) at timesteps (b, f) in [0, 1000]."""
        rows, columns = latents.shape[-2] // self.config.patch[0], latents.shape[-1] // self.config.patch[1]
        step = _Step(
            context=context,
            rotation=rotation(context.positions, rows, columns, self.config.head_dim, latents.device),
            projection=None if cameras is None else projection(cameras),
        )
        x = self._embed_patches(latents)
        e = self.time_embedding(_sinusoid(timesteps, self.config.frequencies).to(self._dtype))
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        for layer, (block, text) in enumerate(zip(self.blocks, prompt.layers, strict=True)):
            x = block(x, e0, text, layer, step)
        return self._unpatchify(self.head(x, e), rows, columns)

    @property
    def _dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def _embed_patches(self, latents: Tensor) -> Tensor:
        """(b, f, c, y, x) to tokens (b, f, n, dim): the patch convolution as one matrix product."""
        b, f, c, y, x = latents.shape
        high, wide = self.config.patch
        patches = latents.reshape(b, f, c, y // high, high, x // wide, wide)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, f, -1, c * high * wide)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patches.to(self._dtype), weight, self.patch_embedding.bias)

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """(b, f, n, patch · c) to (b, f, c, y, x)."""
        b, f = tokens.shape[:2]
        high, wide = self.config.patch
        grid = tokens.reshape(b, f, rows, columns, high, wide, self.config.channels)
        return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, self.config.channels, rows * high, columns * wide)


def _sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """(b, f) timesteps to (b, f, width): cosines, then sines, in float64."""
    exponent = torch.arange(width // 2, dtype=torch.float64, device=timesteps.device) / (width // 2)
    angles = timesteps.double()[..., None] * 10000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
