"""HunyuanVideo-1.5's autoencoder: 4 frames × 16 × 16 pixels to 32 channels, the first frame of a stream on its own.

Diffusers' `AutoencoderKLHunyuanVideo15` has the weights and knows whole clips only; here its layers are walked
a latent frame at a time. A convolution remembers the two frames before, the attention in the middle the keys and
values of the frames before. The stream is exact while that attention reaches back to its start.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minwm.errors import ConfigError
from minwm.models.layout import LatentLayout
from minwm.models.published_vaes import Memory, StreamingVAE, load_vae

REPOSITORY = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"


class HunyuanVAE(StreamingVAE):
    """Streams through an `AutoencoderKLHunyuanVideo15`, which is frozen. See `VideoAutoencoder`.

    exact_latents: the attention sees this many latent frames, the present one included. Up to there a stream
        equals the whole clip; after that it sees the last ones only, and the memory stops growing. The default
        is more than the 31 (121 RGB frames) of the longest clip that HunyuanVideo-1.5 makes.
    """

    def __init__(self, vae: Any, *, exact_latents: int = 32) -> None:
        if exact_latents < 1:
            raise ConfigError(f"exact_latents={exact_latents}: expected at least 1, the present latent frame")
        channels = vae.config.latent_channels
        super().__init__(
            vae,
            LatentLayout(channels=channels, pixels=vae.config.spatial_compression_ratio, leading=True),
            mean=torch.zeros(channels),
            std=torch.full((channels,), 1 / vae.config.scaling_factor),
        )
        self.exact_latents = exact_latents

    def _encode_group(self, pixels: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        past = _Past(memory, self.exact_latents)
        return _encoder(self.vae.encoder, pixels, past), tuple(past.kept)

    def _decode_latent(self, latent: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        past = _Past(memory, self.exact_latents)
        return _decoder(self.vae.decoder, latent, past), tuple(past.kept)


class _Past:
    """Hands every layer of one pass what it kept of the frames before, in order, and collects what it keeps now."""

    def __init__(self, memory: Memory, window: int) -> None:
        self.start = not memory
        self.window = window
        self.kept: list[Tensor] = []
        self._before = iter(memory)

    def and_now(self, x: Tensor, start: Tensor, keep: int) -> Tensor:
        """The frames before, then x (b, c, t, y, x). `start` is before a stream's start; the last `keep` are kept."""
        frames = torch.cat([start if self.start else next(self._before), x], dim=2)
        self.kept.append(frames[:, :, max(frames.shape[2] - keep, 0) :].clone())
        return frames


def _encoder(network: Any, x: Tensor, past: _Past) -> Tensor:
    x = _causal_conv(network.conv_in, x, past)
    for block in network.down_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, past)
        for layer in block.downsamplers or ():
            x = _downsample(layer, x, past)
    x = _middle(network.mid_block, x, past)
    h = _causal_conv(network.conv_out, network.conv_act(network.norm_out(x)), past)
    return h + _channel_means(x, h.shape[1])


def _decoder(network: Any, z: Tensor, past: _Past) -> Tensor:
    x = _causal_conv(network.conv_in, z, past) + z.repeat_interleave(network.repeat, dim=1)
    x = _middle(network.mid_block, x, past)
    for block in network.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, past)
        for layer in block.upsamplers or ():
            x = _upsample(layer, x, past)
    return _causal_conv(network.conv_out, network.conv_act(network.norm_out(x)), past)


def _middle(block: Any, x: Tensor, past: _Past) -> Tensor:
    x = _resnet(block.resnets[0], x, past)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _resnet(resnet, _attention(attention, x, past), past)
    return x


def _resnet(block: Any, x: Tensor, past: _Past) -> Tensor:
    h = _causal_conv(block.conv1, block.nonlinearity(block.norm1(x)), past)
    h = _causal_conv(block.conv2, block.nonlinearity(block.norm2(h)), past)
    shortcut: Tensor = x if block.conv_shortcut is None else block.conv_shortcut(x)
    return h + shortcut


def _causal_conv(layer: Any, x: Tensor, past: _Past) -> Tensor:
    left, right, top, bottom, before, _ = layer.time_causal_padding
    frames = past.and_now(x, start=x[:, :, :1].expand(-1, -1, before, -1, -1), keep=before)
    out: Tensor = layer.conv(F.pad(frames, (left, right, top, bottom, 0, 0), mode=layer.pad_mode))
    return out


def _attention(block: Any, x: Tensor, past: _Past) -> Tensor:
    """x (b, c, 1, y, x): with one frame at a time, all keys are of the past or the present, and no mask is needed."""
    normed = block.norm(x)
    q, k, v = block.to_q(normed), block.to_k(normed), block.to_v(normed)
    k, v = (past.and_now(part, start=part[:, :, :0], keep=past.window - 1) for part in (k, v))
    q, k, v = (part.flatten(2).transpose(1, 2)[:, None] for part in (q, k, v))  # (b, 1, tokens, c)
    seen = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
    out: Tensor = block.proj_out(seen)
    return x + out


def _downsample(layer: Any, x: Tensor, past: _Past) -> Tensor:
    """2 × 2 pixels, and 2 frames where time is halved too, into channels; a stream's first frame stands for both."""
    merged = 2 if layer.add_temporal_downsample and not past.start else 1
    h: Tensor = layer._dcae_downsample_rearrange(_causal_conv(layer.conv, x, past), merged)
    if layer.add_temporal_downsample and past.start:
        h = torch.cat([h, h], dim=1)
    return h + _channel_means(layer._dcae_downsample_rearrange(x, merged), h.shape[1])


def _upsample(layer: Any, x: Tensor, past: _Past) -> Tensor:
    """Channels into 2 × 2 pixels, and 2 frames where time is doubled too; a stream's first frame stays one."""
    h: Tensor = _causal_conv(layer.conv, x, past)
    shortcut: Tensor
    if layer.add_temporal_upsample:
        made = 1 if past.start else 2
        h = layer._dcae_upsample_rearrange(h, made)[:, : layer.conv.conv.out_channels // 8]
        shortcut = layer._dcae_upsample_rearrange(x, made)
        shortcut = shortcut.repeat_interleave(h.shape[1] // shortcut.shape[1], dim=1)
    else:
        h = layer._dcae_upsample_rearrange(h)
        shortcut = layer._dcae_upsample_rearrange(x.repeat_interleave(layer.repeats, dim=1))
    return h + shortcut


def _channel_means(x: Tensor, channels: int) -> Tensor:
    """x (b, c, t, y, x) to fewer channels, each the mean of neighbours."""
    means: Tensor = x.unflatten(1, (channels, -1)).mean(2)
    return means


def load_hunyuan_vae(folder: Path, dtype: torch.dtype = torch.float32, *, exact_latents: int = 32) -> HunyuanVAE:
    """The autoencoder in a folder as Diffusers saves it. Raises CheckpointError when it is absent or doesn't fit."""
    from diffusers import AutoencoderKLHunyuanVideo15

    return HunyuanVAE(load_vae(AutoencoderKLHunyuanVideo15, folder, dtype, REPOSITORY), exact_latents=exact_latents)
