"""The HunyuanVideo 1.5 transformer: double blocks in which image and text tokens attend jointly (MMDiT).

Image tokens are modulated frame by frame. In causal passes the text sees only itself, at timestep 0, so its keys
and values are computed once per prompt; in bidirectional passes it sees the frames too. Module names are those
of the official checkpoints. Facts: HunyuanVideo 1.5 technical report (arXiv 2511.18870).
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
    Steering,
    require_known,
)
from minwm.models.context import Beside, Bidirectional, Context, History, attention
from minwm.models.hunyuan_text import (
    GlyphProjection,
    HunyuanText,
    TimestepEmbedder,
    TokenRefiner,
    TypeEmbedding,
    VisionProjection,
    checked,
)
from minwm.models.layers import RMSNorm, dtype_of
from minwm.models.rope import Axes, rotate, rotations
from minwm.models.transformer import Transformer, require_batch


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig:
    """Sizes, and three choices that published weights differ in.

    prope_history: what the attention by camera sees of a cache's past: "exact" as in training, or "compat", the past
        as attention by position left it, which minWM's few-step weights were distilled with
    text_timestep: at which the text is embedded: "zero", or "frames", the frames' own, as the bidirectional
        release does it; such a model can't be run causally
    action_labels: how left and right are numbered: "minwm", or "released", the other way round (geometry/actions.py)
    """

    kind: Literal["hunyuan"] = "hunyuan"
    dim: int
    layers: int
    heads: int
    mlp_dim: int
    channels: int = 32
    patch: tuple[int, int] = (1, 1)
    frequencies: int = 256
    axes: Axes = (16, 56, 56)
    theta: float = 256.0
    refiner_layers: int = 2
    text_dim: int = 3584
    text_length: int = 1000
    glyph_dim: int = 1472
    glyph_hidden: int = 2048
    glyph_length: int = 256
    vision_dim: int = 1152
    vision_length: int = 729
    eps: float = 1e-6
    conditions: tuple[ConditionName, ...] = ()
    prope_history: Literal["exact", "compat"] = "exact"
    text_timestep: Literal["zero", "frames"] = "zero"
    action_labels: Literal["minwm", "released"] = "minwm"

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.head_dim % 4 or sum(self.axes) != self.head_dim:
            raise ConfigError(
                f"dim={self.dim}, heads={self.heads}, axes={self.axes}: "
                "expected a head size that is a whole multiple of 4 and the sum of the axes"
            )
        if self.patch != (1, 1):
            raise ConfigError(f"patch={self.patch}: expected (1, 1), as every published HunyuanVideo 1.5 has it")
        require_known(self.conditions)
        if "first_image" in self.conditions:
            raise ConfigError("conditions: first_image is part of every HunyuanVideo 1.5, expected it not to be named")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads

    def cache_geometry(self, rows: int, columns: int, history: History) -> CacheGeometry:
        """What a stream of latents of rows × columns keeps."""
        branches = 2 if "camera_prope" in self.conditions and self.prope_history == "exact" else 1
        return CacheGeometry(
            layers=self.layers,
            heads=self.heads * branches,
            branches=branches,
            head_dim=self.head_dim,
            tokens_per_frame=rows * columns,
            history=history,
            beside=self.text_length + self.glyph_length + self.vision_length,
        )


@dataclass(frozen=True)
class HunyuanPrompt:
    """A prompt for causal passes (keys and values per layer), or for bidirectional ones (what it was made of)."""

    text: HunyuanText | None = None
    layers: tuple[Beside, ...] | None = None

    def detach(self) -> "HunyuanPrompt":
        """The same, without gradient."""
        return HunyuanPrompt(self.text, self.layers and tuple(layer.detach() for layer in self.layers))


@dataclass(frozen=True)
class _Step:
    """What every block of one pass shares."""

    context: Context
    rotation: Tensor
    camera: prope.Projection | None
    past_by_position: bool


class Modulation(nn.Module):
    """Shift, scale and gate, twice, in one vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, vector: Tensor) -> Tensor:
        """(b, f, dim) to (b, f, 6 · dim)."""
        return self.linear(F.silu(vector))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class DoubleBlock(nn.Module):
    """A stream of image tokens and one of text tokens: weights of their own, attention in common.

    The parts of a stream are registered as `img_…` and `txt_…`, the names of the checkpoints.
    """

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.heads, self.eps = config.heads, config.eps
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(config.dim))
            for part in ("q", "k", "v", "proj"):
                self.add_module(f"{stream}_attn_{part}", nn.Linear(config.dim, config.dim))
            for part in ("q", "k"):
                self.add_module(f"{stream}_attn_{part}_norm", RMSNorm(config.head_dim, config.eps))
            self.add_module(f"{stream}_mlp", MLP(config.dim, config.mlp_dim))
        if "camera_prope" in config.conditions:
            self.img_attn_prope_proj = nn.Linear(config.dim, config.dim)
            nn.init.zeros_(self.img_attn_prope_proj.weight)
            nn.init.zeros_(self.img_attn_prope_proj.bias)

    def forward(self, x: Tensor, vector: Tensor, beside: Beside, layer: int, step: _Step) -> Tensor:
        """Image tokens x (b, f, n, dim), modulated by vector (b, f, dim), that see the text's keys and values."""
        modulation = self._modulation("img", vector)
        return self._image(x, modulation, self._heads("img", x, modulation), beside, layer, step)

    def forward_joint(
        self, x: Tensor, vector: Tensor, text: Tensor, mask: Tensor | None, text_vector: Tensor, layer: int, step: _Step
    ) -> tuple[Tensor, Tensor]:
        """Image tokens x (b, f, n, dim) and text tokens (b, l, dim) that see each other."""
        modulation, text_modulation = self._modulation("img", vector), self._modulation("txt", text_vector)
        text = text[:, None]
        q, k, v = self._heads("img", x, modulation)
        text_q, text_k, text_v = self._heads("txt", text, text_modulation)
        beside = Beside(text_k.to(v.dtype), text_v, mask)
        placed = rotate(k, step.rotation).to(v.dtype)
        read = cast(Bidirectional, step.context).read(text_q.to(v.dtype), placed, v, beside)
        x = self._image(x, modulation, (q, k, v), beside, layer, step)
        return x, self._finish("txt", text, text_modulation, self._part("txt_attn_proj", read.flatten(2)))[:, 0]

    def forward_text(self, text: Tensor, mask: Tensor | None, vector: Tensor) -> tuple[Tensor, Beside]:
        """Text tokens (b, l, dim) that see themselves, and the keys and values that image tokens see."""
        modulation = self._modulation("txt", vector)
        text = text[:, None]
        q, k, v = self._heads("txt", text, modulation)
        beside = Beside(k.to(v.dtype), v, mask)
        read = attention(q.to(v.dtype), beside.keys, v, beside.key_mask(0))
        return self._finish("txt", text, modulation, self._part("txt_attn_proj", read.flatten(2)))[:, 0], beside

    def _part(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x)  # type: ignore[no-any-return]

    def _modulation(self, stream: str, vector: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate, shift, scale, gate, each (b, f, 1, dim), from vector (b, f, dim)."""
        return self._part(f"{stream}_mod", vector).unsqueeze(2).chunk(6, dim=-1)

    def _heads(self, stream: str, x: Tensor, modulation: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (normalised, float32) and values (b, f·n, h, d) of tokens (b, f, n, dim)."""
        y = self._norm(x, *modulation[:2]).flatten(1, 2)
        q, k, v = (self._part(f"{stream}_attn_{part}", y).unflatten(-1, (self.heads, -1)) for part in "qkv")
        q, k = (self._part(f"{stream}_attn_{part}_norm", z) for part, z in (("q", q), ("k", k)))
        return q, k, v

    def _image(
        self,
        x: Tensor,
        modulation: tuple[Tensor, ...],
        qkv: tuple[Tensor, Tensor, Tensor],
        beside: Beside,
        layer: int,
        step: _Step,
    ) -> Tensor:
        by_position, by_camera = prope.attend(
            step.context, layer, qkv, step.rotation, step.camera, beside, past_by_position=step.past_by_position
        )
        out = self._part("img_attn_proj", by_position.flatten(2))
        if by_camera is not None:
            out = out + self.img_attn_prope_proj(by_camera.flatten(2))
        return self._finish("img", x, modulation, out)

    def _finish(self, stream: str, x: Tensor, modulation: tuple[Tensor, ...], read: Tensor) -> Tensor:
        """The residuals: what attention read (b, f·n, dim), then the MLP."""
        _, _, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * read.unflatten(1, x.shape[1:3])
        return x + gate2 * self._part(f"{stream}_mlp", self._norm(x, shift2, scale2))

    def _norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift


class FinalLayer(nn.Module):
    """Tokens to velocity."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.linear = nn.Linear(config.dim, config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x (b, f, n, dim), vector (b, f, dim) to (b, f, n, channels)."""
        shift, scale = self.adaLN_modulation(vector).unsqueeze(2).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift
        return self.linear(x)  # type: ignore[no-any-return]


class PatchEmbedding(nn.Module):
    """Latents, the first image and its mask to tokens."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(2 * config.channels + 1, config.dim, 1)

    def forward(self, latents: Tensor, image: Tensor | None, positions: Sequence[int]) -> Tensor:
        """(b, f, c, y, x) and (b, c + 1, y, x) to (b, f, n, dim); the image belongs to the stream's frame 0."""
        b, f, c, y, x = latents.shape
        given = latents.new_zeros(b, f, c + 1, y, x)
        if image is not None:
            given[:, [position == 0 for position in positions]] = image[:, None].to(given.dtype)
        tokens = torch.cat([latents, given], dim=2).flatten(3).mT
        weight = self.proj.weight
        return F.linear(tokens.to(weight.dtype), weight.flatten(1), self.proj.bias)


class Hunyuan(Transformer):
    """The transformer."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__(config)
        self.config = config
        dim = config.dim
        self.img_in = PatchEmbedding(config)
        self.txt_in = TokenRefiner(
            width=config.text_dim,
            dim=dim,
            heads=config.heads,
            hidden=config.mlp_dim,
            layers=config.refiner_layers,
            frequencies=config.frequencies,
            eps=config.eps,
        )
        self.byt5_in = GlyphProjection(config.glyph_dim, config.glyph_hidden, dim)
        self.vision_in = VisionProjection(config.vision_dim, dim)
        self.cond_type_embedding = TypeEmbedding(dim)
        self.time_in = TimestepEmbedder(dim, config.frequencies)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config)
        sizes = BranchSizes(
            dim=dim,
            heads=config.heads,
            layers=config.layers,
            channels=config.channels,
            patch=config.patch,
            swap_sides=config.action_labels == "released",
        )
        self.conditions = ConditionBranches(config.conditions, sizes)

    def prompt(self, text: HunyuanText, *, bidirectional: bool = False) -> HunyuanPrompt:
        """A prompt for causal passes, where the text is run through all blocks once, or for bidirectional ones.

        Raises InputError for a prompt that does not fit the model or has no text, ConfigError for a causal one
        where `text_timestep` is "frames".
        """
        text = self._checked(text)
        if bidirectional:
            return HunyuanPrompt(text=text)
        if self.config.text_timestep == "frames":
            raise ConfigError("text_timestep: is 'frames', expected 'zero' for causal passes")
        zero = torch.zeros(len(text.language.states), device=text.language.states.device)
        tokens, mask = self._embed_text(text, zero)
        vector = self.time_in(zero)[:, None]
        layers = []
        for block in self.double_blocks:
            tokens, beside = self.run(cast(DoubleBlock, block).forward_text, tokens, mask, vector)
            layers.append(beside)
        return HunyuanPrompt(layers=tuple(layers))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt: HunyuanPrompt,
        context: Context,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Velocity (b, f, c, y, x) of latents (b, f, c, y, x) at timesteps (b, f) in [0, 1000]."""
        config, conditions = self.config, conditions or Conditions()
        rows, columns = self.grid(latents, timesteps, context)
        frames = Frames(batch=len(latents), positions=context.positions, rows=rows, columns=columns)
        by_camera = "camera_prope" in config.conditions
        step = _Step(
            context=context,
            rotation=self.rotation(context.streams, rows, columns, latents.device),
            camera=frames.cameras(conditions).projection if by_camera else None,
            past_by_position=config.prope_history == "compat",
        )
        steering = self.conditions.steer(conditions, frames)
        image = frames.image(conditions, config.channels, config.patch)
        x = steering.onto_tokens(self.img_in(latents, image, context.positions))
        vector = steering.onto_time(self.time_in(timesteps))
        if context.bidirectional:
            x = self._run_joint(x, vector, timesteps, prompt, step, steering)
        else:
            x = self._run_causal(x, vector, prompt, step, steering)
        return self.final_layer(x, vector).mT.unflatten(-1, (rows, columns))  # type: ignore[no-any-return]

    def rotation(self, streams: Sequence[Sequence[int]], rows: int, columns: int, device: torch.device) -> Tensor:
        """See Transformer."""
        return rotations(streams, rows, columns, self.config.axes, device, theta=self.config.theta)

    def _run_causal(self, x: Tensor, vector: Tensor, prompt: HunyuanPrompt, step: _Step, steering: Steering) -> Tensor:
        if prompt.layers is None:
            raise InputError("prompt: was made for bidirectional passes, expected one for causal passes")
        require_batch(len(prompt.layers[0].keys), len(x))
        for layer, (block, beside) in enumerate(zip(self.double_blocks, prompt.layers, strict=True)):
            x = steering.after_block(layer, self.run(block, x, vector, beside, layer, step))
        return x

    def _run_joint(
        self, x: Tensor, vector: Tensor, timesteps: Tensor, prompt: HunyuanPrompt, step: _Step, steering: Steering
    ) -> Tensor:
        if prompt.text is None:
            raise InputError("prompt: was made for causal passes, expected one for bidirectional passes")
        require_batch(len(prompt.text.language.states), len(x))
        # where frames differ in noise (some are given clean), the noisiest is the pass's timestep
        timestep = timesteps.amax(1) * (self.config.text_timestep == "frames")
        text, mask = self._embed_text(prompt.text, timestep)
        text_vector = self.time_in(timestep)[:, None]
        for layer, block in enumerate(self.double_blocks):
            joint = cast(DoubleBlock, block).forward_joint
            x, text = self.run(joint, x, vector, text, mask, text_vector, layer, step)
            x = steering.after_block(layer, x)
        return x

    def _checked(self, text: HunyuanText) -> HunyuanText:
        config, dtype = self.config, dtype_of(self)
        if not text.language.mask.any(1).all():
            raise InputError("prompt.language: has no token in one of the streams, expected at least one")
        return HunyuanText(
            checked("language", text.language, width=config.text_dim, limit=config.text_length, dtype=dtype),
            checked("glyphs", text.glyphs, width=config.glyph_dim, limit=config.glyph_length, dtype=dtype),
            checked("vision", text.vision, width=config.vision_dim, limit=config.vision_length, dtype=dtype),
        )

    def _embed_text(self, text: HunyuanText, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (b, l, dim) of image, glyphs and text, and which of them are real; None where all are."""
        language, glyphs, vision = self.cond_type_embedding.weight
        parts = (
            self.vision_in(text.vision.states) + vision,
            self.byt5_in(text.glyphs.states) + glyphs,
            self.txt_in(text.language, timestep) + language,
        )
        mask = torch.cat([text.vision.mask, text.glyphs.mask, text.language.mask], dim=1)
        return torch.cat(parts, dim=1), None if mask.all() else mask
