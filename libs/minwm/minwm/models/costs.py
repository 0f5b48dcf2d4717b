"""What a transformer costs to run and to train: weights, caches, prompts and activations in bytes, passes in FLOPs.

Formulas of sizes alone, for one stream with a prompt as long as the model takes. FLOPs are those of matrix products
and attention, two per multiply-add; a backward pass has twice its forward's. Left out: norms, activations and other
work per element; a frame's own camera matrices and rays; the first image's channels, of one frame in a stream;
autoencoders and text encoders.
"""

from dataclasses import astuple, dataclass

import torch

from minwm.errors import ConfigError
from minwm.models.backbones import new_model
from minwm.models.conditions import FREQUENCIES, TOKENS, ConditionName
from minwm.models.context import History, teacher_forcing
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.wan import WanConfig

Sizes = WanConfig | HunyuanConfig


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Shape of one forward of one stream.

    frames: latent frames that go in
    pairs:  of latent frames of which one sees the other
    tokens: of a frame
    """

    frames: int
    pairs: int
    tokens: int
    bidirectional: bool = False

    @classmethod
    def full(cls, frames: int, tokens: int) -> "Pass":
        """Every frame sees every frame."""
        return cls(frames=frames, pairs=frames**2, tokens=tokens, bidirectional=True)

    @classmethod
    def teacher_forced(cls, frames: int, tokens: int, history: History) -> "Pass":
        """Clean frames and the same ones noisy, under a mask. What it hides is not computed."""
        return cls(frames=2 * frames, pairs=int(teacher_forcing(frames, history).mask.sum()), tokens=tokens)

    @classmethod
    def cached(cls, history: History, tokens: int, start: int | None = None) -> "Pass":
        """A chunk that sees a full window, or what a stream of `start` frames before it has."""
        full = history.sink + history.window
        seen = full if start is None else min(full, start + history.chunk)
        return cls(frames=history.chunk, pairs=history.chunk * seen, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one forward.

    linear:     layers that every token passes
    modulation: layers of the timestep, once per frame
    attention:  among the frames, by position and, where there are cameras, by camera
    text:       attention to the prompt; in HunyuanVideo's bidirectional passes also the text's own blocks
    conditions: branches of the conditions, PRoPE's projection and its 4 × 4 maps included
    """

    linear: int
    modulation: int
    attention: int
    text: int
    conditions: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(astuple(self))


def parameters(architecture: Sizes) -> int:
    """How many the transformer has, its conditions' branches included."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in new_model(architecture).parameters())


def prompt_bytes(architecture: Sizes, dtype: torch.dtype) -> int:
    """Memory of one stream's prompt in causal passes: keys and values of every layer."""
    return 2 * architecture.layers * prompt_tokens(architecture) * architecture.dim * dtype.itemsize


def prompt_flops(architecture: Sizes) -> int:
    """FLOPs of making the prompt, which HunyuanVideo's bidirectional passes do themselves."""
    if isinstance(architecture, HunyuanConfig):
        return _text_stream(architecture, 0)
    dim = architecture.dim
    return _linear(architecture.text_length, architecture.text_dim * dim + (1 + 2 * architecture.layers) * dim**2)


def activation_bytes(architecture: Sizes, tokens: int, *, bf16: bool = True, checkpointed: bool = False) -> int:
    """Memory, roughly, that a pass with gradient over `tokens` tokens keeps for its backward.

    With activations checkpointed: what goes into every block, and one block's own at a time. Left out: what does not
    grow with the blocks, and the keys and values that a pass sees of a cache.
    """
    if isinstance(architecture, WanConfig):
        hidden, per_channel, stream = architecture.ffn_dim, 65 if bf16 else 89, 4
    else:
        hidden, per_channel, stream = architecture.mlp_dim, 41 if bf16 else 73, 2 if bf16 else 4
    if "camera_prope" in architecture.conditions:
        per_channel += 10 if bf16 else 20
    block = tokens * (per_channel * architecture.dim + (4 if bf16 else 8) * hidden)
    inputs = architecture.layers * tokens * stream * architecture.dim
    return inputs + block if checkpointed else architecture.layers * block


def prompt_tokens(architecture: Sizes) -> int:
    """Tokens of the longest prompt; Wan's are padded to as many."""
    if isinstance(architecture, WanConfig):
        return architecture.text_length
    return architecture.text_length + architecture.glyph_length + architecture.vision_length


def picture_size(preset: str) -> tuple[int, int]:
    """Height and width in pixels that a preset is run at unless asked otherwise."""
    return (96, 128) if preset == "wan-doom" else (480, 832)


def latent_size(architecture: Sizes, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the latents of a picture of height × width pixels.

    Raises ConfigError unless both sides are whole numbers of tokens.
    """
    pixels = 8 if isinstance(architecture, WanConfig) else 16  # along a side, in the backbone's autoencoder
    for name, side, patch in (("height", height, architecture.patch[0]), ("width", width, architecture.patch[1])):
        if side < 1 or side % (pixels * patch):
            raise ConfigError(f"{name}={side}: expected a positive multiple of {pixels * patch} pixels")
    return height // pixels, width // pixels


def forward_flops(architecture: Sizes, shape: Pass) -> Flops:
    """FLOPs of one forward."""
    dim, layers = architecture.dim, architecture.layers
    queries, text = shape.frames * shape.tokens, prompt_tokens(architecture)
    branches = 2 if "camera_prope" in architecture.conditions else 1
    if isinstance(architecture, WanConfig):
        per_token, per_frame = _wan_weights(architecture)
        to_text = layers * _attention(queries, text, dim)
    else:
        per_token, per_frame = _hunyuan_weights(architecture)
        to_text = branches * layers * _attention(queries, text, dim)
        if shape.bidirectional:
            to_text += _text_stream(architecture, queries)
    return Flops(
        linear=_linear(queries, per_token),
        modulation=_linear(shape.frames, per_frame),
        attention=branches * layers * shape.pairs * _attention(shape.tokens, shape.tokens, dim),
        text=to_text,
        conditions=_conditions(architecture, shape),
    )


def chunk_flops(architecture: Sizes, history: History, tokens: int, steps: int) -> int:
    """FLOPs of a chunk in a stream with a full window: its denoising steps, and the pass that commits it."""
    return (steps + 1) * forward_flops(architecture, Pass.cached(history, tokens)).total


def _linear(rows: int, weights: int) -> int:
    return 2 * rows * weights


def _attention(queries: int, keys: int, dim: int) -> int:
    return 4 * queries * keys * dim  # logits, and the weighted sum of values


def _wan_weights(config: WanConfig) -> tuple[int, int]:
    """Weights that a token passes, and that a frame's timestep passes."""
    dim, patch = config.dim, config.patch[0] * config.patch[1] * config.channels
    block = 6 * dim**2 + 2 * dim * config.ffn_dim  # q, k, v and o; q and o of the cross-attention
    return config.layers * block + 2 * patch * dim, config.frequencies * dim + 7 * dim**2


def _hunyuan_weights(config: HunyuanConfig) -> tuple[int, int]:
    """Weights that an image token passes, and that a frame's timestep passes."""
    dim = config.dim
    ends = (3 * config.channels + 1) * dim  # latents, first image and mask come in, velocities go out
    timestep = config.frequencies * dim + dim**2
    return config.layers * _hunyuan_block(config) + ends, timestep + (6 * config.layers + 2) * dim**2


def _hunyuan_block(config: HunyuanConfig) -> int:
    return 4 * config.dim**2 + 2 * config.dim * config.mlp_dim


def _text_stream(config: HunyuanConfig, queries: int) -> int:
    """Text tokens embedded, and run beside `queries` image tokens, which they see."""
    dim, text = config.dim, prompt_tokens(config)
    timestep = config.frequencies * dim + dim**2
    glyphs = config.glyph_dim * config.glyph_hidden + config.glyph_hidden**2 + config.glyph_hidden * dim
    embed = (
        _linear(config.vision_length, config.vision_dim**2 + config.vision_dim * dim)
        + _linear(config.glyph_length, glyphs)
        + _linear(config.text_length, config.text_dim * dim)
        + _linear(1, timestep + config.text_dim * dim + dim**2)  # the refiner's timestep, and the states' mean
    )
    refiner = (
        _linear(config.text_length, _hunyuan_block(config))
        + _linear(1, 2 * dim**2)
        + _attention(config.text_length, config.text_length, dim)
    )
    block = _linear(text, _hunyuan_block(config)) + _linear(1, 6 * dim**2) + _attention(text, text + queries, dim)
    return embed + config.refiner_layers * refiner + _linear(1, timestep) + config.layers * block


def _conditions(architecture: Sizes, shape: Pass) -> int:
    dim, frames, queries = architecture.dim, shape.frames, shape.frames * shape.tokens
    patch = architecture.patch[0] * architecture.patch[1]
    look = architecture.layers * (
        _linear(queries, 2 * dim**2) + _linear(TOKENS * frames, 2 * dim**2) + _attention(queries, TOKENS, dim)
    )
    maps = 4 * 4 * dim  # q, k, v and what was read, four channels a product
    each: dict[ConditionName, int] = {
        "camera_prope": architecture.layers * _linear(queries, dim**2 + maps),
        "camera_plucker": _linear(queries, 6 * patch * dim),
        "camera_attention": look + _linear(frames, 14 * dim + TOKENS * dim**2),
        "action_attention": look,
        "action_timestep": _linear(frames, FREQUENCIES * dim + dim**2),
        "first_image": 0,
    }
    return sum(each[name] for name in architecture.conditions)
