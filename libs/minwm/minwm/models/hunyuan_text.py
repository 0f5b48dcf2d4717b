"""How HunyuanVideo 1.5 reads its prompt: text through a token refiner, glyphs and a first image through projections.

Embeddings of the encoders go in, tokens of the transformer's width come out, with a mask of which are real.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minwm.errors import InputError
from minwm.models.context import attention
from minwm.models.layers import dtype_of, sinusoid
from minwm.models.text import Embedded
from minwm.models.transformer import require_length


@dataclass(frozen=True)
class HunyuanText:
    """What the encoders made of a prompt: the language model, byT5 of quoted words, SigLIP of the first image.

    A stream without glyphs or without a first image has a mask that is false throughout.
    """

    language: Embedded
    glyphs: Embedded
    vision: Embedded


class TimestepEmbedder(nn.Module):
    """Sinusoid and MLP."""

    def __init__(self, dim: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Timesteps (…) to (…, dim)."""
        return self.mlp(sinusoid(timesteps, self.frequencies).to(dtype_of(self.mlp)))  # type: ignore[no-any-return]


class _MeanEmbedder(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))  # type: ignore[no-any-return]


class _RefinerMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))  # type: ignore[no-any-return]


class _RefinerBlock(nn.Module):
    """Self-attention among the text's tokens, gated by timestep and mean."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = _RefinerMLP(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        gate1, gate2 = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + gate1 * self.self_attn_proj(attention(q, k, v, mask[:, None, None]).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class _Blocks(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class TokenRefiner(nn.Module):
    """The language model's states to tokens."""

    def __init__(
        self, *, width: int, dim: int, heads: int, hidden: int, layers: int, frequencies: int, eps: float
    ) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(width, dim)
        self.t_embedder = TimestepEmbedder(dim, frequencies)
        self.c_embedder = _MeanEmbedder(width, dim)
        self.individual_token_refiner = _Blocks([_RefinerBlock(dim, heads, hidden, eps) for _ in range(layers)])

    def forward(self, text: Embedded, timestep: Tensor) -> Tensor:
        """States (b, l, width) at timesteps (b,) to (b, l, dim); what is masked is not looked at."""
        mean = text.zeroed().sum(1) / text.mask.sum(1, keepdim=True)
        c = self.t_embedder(timestep) + self.c_embedder(mean)
        x = self.input_embedder(text.states)
        for block in self.individual_token_refiner.blocks:
            x = block(x, c, text.mask)
        return x  # type: ignore[no-any-return]


class GlyphProjection(nn.Module):
    """byT5's states to tokens."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        self.fc1, self.fc2, self.fc3 = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, width) to (b, l, dim)."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.layernorm(x))))))  # type: ignore[no-any-return]


class VisionProjection(nn.Module):
    """SigLIP's states to tokens."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim), nn.LayerNorm(dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, width) to (b, l, dim)."""
        return self.proj(x)  # type: ignore[no-any-return]


class TypeEmbedding(nn.Module):
    """What tells the prompt's parts apart: a vector each for text, glyphs and image."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dim))


def checked(name: str, part: Embedded, *, width: int, limit: int, dtype: torch.dtype) -> Embedded:
    """One part of a prompt without the columns that no stream uses. Raises InputError for one that does not fit."""
    if part.states.shape[-1] != width:
        raise InputError(f"prompt.{name}: has states {tuple(part.states.shape)}, expected (b, l, {width})")
    require_length(f"prompt.{name}", int(part.mask.sum(1).max()), limit)
    used = part.mask.any(0)
    return Embedded(part.zeroed()[:, used].to(dtype), part.mask[:, used])
