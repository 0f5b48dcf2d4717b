"""What the adapters around Diffusers' causal video autoencoders share: streams, normalised latents, strict loading.

A stream goes through the network in one rhythm, whatever pieces it comes in: the first RGB frame alone, then four
at a time; latents one at a time. So any split gives bit for bit what the whole gives, and a pass needs no more
memory for a longer piece. What the network remembers goes in and comes out as a value; the adapters say what it is.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minwm.errors import CheckpointError, DataError
from minwm.models.checkpoints import check_fit, read_json
from minwm.models.layout import FRAMES_PER_LATENT, LatentLayout

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

Memory = tuple[Any, ...]
"""What the network remembers of the frames before, layer by layer; empty at a stream's start."""

EncoderState = tuple[Tensor, Memory]
"""Frames of an unfinished group, and the memory. The decoder's state is its memory alone."""


class StreamingVAE(nn.Module, ABC):
    """A frozen Diffusers autoencoder as a `VideoAutoencoder`; latents are the posterior's mode, normalised.

    The network computes in its own dtype; what comes out has the dtype of what went in.
    mean, std (c,): the latents' statistics, which stay in float32.
    """

    vae: Any
    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any, layout: LatentLayout, *, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.layout = layout
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)

    @torch.no_grad()
    def encode(self, frames: Tensor, state: EncoderState | None = None) -> tuple[Tensor, EncoderState]:
        """Frames (b, t, 3, y, x) in [0, 1] to latents (b, f, c, y / pixels, x / pixels), and the state to go on from.

        The first frame of a stream makes a latent frame, then every four; up to three wait in the state.
        Raises DataError when the sides are not multiples of the layout's pixels.
        """
        side = self.layout.pixels
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[3] % side or frames.shape[4] % side:
            expected = f"(b, t, 3, y, x) with y and x multiples of {side}"
            raise DataError(f"frames: shape {tuple(frames.shape)}, expected {expected}")
        waiting, memory = state or (frames[:, :0], ())
        frames = torch.cat([waiting, frames], dim=1)
        b, _, _, y, x = frames.shape
        latents = [frames.new_empty(b, 0, self.layout.channels, y // side, x // side)]
        while frames.shape[1] >= (group := FRAMES_PER_LATENT if memory else 1):
            pixels = (frames[:, :group].transpose(1, 2) * 2 - 1).to(self.vae.dtype)
            moments, memory = self._encode_group(pixels, memory)
            mode = moments[:, : self.layout.channels, 0]  # a Gaussian's mode is its mean
            latents.append(((mode - self.mean) / self.std)[:, None].to(frames.dtype))
            frames = frames[:, group:]
        return torch.cat(latents, dim=1), (frames.clone(), memory)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        """Latents (b, f, c, y, x) to frames (b, t, 3, pixels · y, pixels · x), and the state to go on from.

        The first latent frame of a stream makes one frame, every later one four. Frames are in [0, 1] but for
        overshoots, which are left for the caller to clamp. Raises DataError on latents of other channels.
        """
        if latents.ndim != 5 or latents.shape[2] != self.layout.channels:
            raise DataError(f"latents: shape {tuple(latents.shape)}, expected (b, f, {self.layout.channels}, y, x)")
        memory = state or ()
        b, _, _, y, x = latents.shape
        frames = [latents.new_empty(b, 0, 3, self.layout.pixels * y, self.layout.pixels * x)]
        for latent in latents.unbind(1):
            z = (latent * self.std + self.mean).to(self.vae.dtype)
            pixels, memory = self._decode_latent(z[:, :, None], memory)
            frames.append(((pixels + 1) / 2).transpose(1, 2).to(latents.dtype))
        return torch.cat(frames, dim=1), memory

    @abstractmethod
    def _encode_group(self, pixels: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Pixels (b, 3, 1 or 4, y, x) in [-1, 1] to the moments of one latent frame (b, 2c, 1, y, x)."""

    @abstractmethod
    def _decode_latent(self, latent: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One latent frame (b, c, 1, y, x) to its pixels (b, 3, 1 or 4, y, x) in [-1, 1]."""


def load_vae(kind: Any, folder: Path, dtype: torch.dtype, repository: str) -> Any:
    """The Diffusers autoencoder of class `kind` in a folder as Diffusers saves it, its weights cast to dtype.

    Strict, and never online: CheckpointError says what is missing, and where `repository` on the hub has it.
    """
    if not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
        raise CheckpointError(
            f"{folder}: expected {CONFIG} and {WEIGHTS} of an {kind.__name__}; "
            f"get them with `hf download {repository} --include 'vae/*' --local-dir PARENT`, they are in PARENT/vae"
        )
    config = read_json(folder / CONFIG)
    if config.get("_class_name") != kind.__name__:
        raise CheckpointError(f"{folder}: holds a {config.get('_class_name')!r}, expected a {kind.__name__!r}")
    with torch.device("meta"):
        vae = kind.from_config(config)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: damaged ({error})") from error
    check_fit(vae.state_dict(), weights, where=str(folder / WEIGHTS))
    vae.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return vae


def state_bytes(state: Any) -> int:
    """Bytes of the tensors in a stream's state, either direction's; 0 for None, a stream's start."""
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(map(state_bytes, state)) if isinstance(state, tuple) else 0
