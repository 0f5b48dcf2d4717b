"""Wan 2.1's autoencoder: 4 frames × 8 × 8 pixels to 16 channels, the first frame of a stream on its own.

Diffusers' `AutoencoderKLWan` does the arithmetic. Its convolutions take the frames before from a list that
is handed through the network; we keep that list as the stream's memory, and the module keeps nothing.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minwm.errors import CheckpointError
from minwm.models.layout import LatentLayout
from minwm.models.published_vaes import Memory, StreamingVAE, load_vae

REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class WanVAE(StreamingVAE):
    """Streams through an `AutoencoderKLWan`, which is frozen. See `VideoAutoencoder`.

    Raises CheckpointError for Wan 2.2's autoencoder, which is another network under the same class.
    """

    def __init__(self, vae: Any) -> None:
        config = vae.config
        if config.is_residual or config.patch_size is not None:
            raise CheckpointError(
                f"the autoencoder has is_residual={config.is_residual}, patch_size={config.patch_size}: "
                "expected Wan 2.1's, with neither"
            )
        super().__init__(
            vae,
            LatentLayout(channels=config.z_dim, pixels=config.scale_factor_spatial, leading=True),
            mean=torch.tensor(config.latents_mean),
            std=torch.tensor(config.latents_std),
        )

    def _encode_group(self, pixels: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        moments, memory = _through(self.vae.encoder, pixels, memory)
        return self.vae.quant_conv(moments), memory

    def _decode_latent(self, latent: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return _through(self.vae.decoder, self.vae.post_quant_conv(latent), memory)


def _through(network: nn.Module, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """One pass over x (b, c, t, y, x). The network replaces the list's entries, never what is in them."""
    features = list(memory) or [None for layer in network.modules() if isinstance(layer, nn.Conv3d)]
    return network(x, feat_cache=features, feat_idx=[0]), tuple(features)


def load_wan_vae(folder: Path, dtype: torch.dtype = torch.float32) -> WanVAE:
    """The autoencoder in a folder as Diffusers saves it. Raises CheckpointError when it is absent or doesn't fit."""
    from diffusers import AutoencoderKLWan

    return WanVAE(load_vae(AutoencoderKLWan, folder, dtype, REPOSITORY))
