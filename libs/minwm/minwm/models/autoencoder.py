"""Our tiny streaming video autoencoder (4 frames × 8 × 8 pixels to one latent vector), and its decoder by itself.

2-D convolutions, and in every block a memory of one past frame (the TAEHV family's idea: github.com/madebyollin/taehv).
State goes in and comes out, so encoding or decoding a video in any split gives what the whole gives.
Every latent frame of ours stands for exactly four RGB frames, the first one too; a decoder by itself takes
its latents' layout from its configuration. Frames are (b, t, 3, y, x) in [0, 1]; latents (b, f, c, y/8, x/8),
normalised per channel to zero mean and unit deviation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minwm.errors import ConfigError, DataError
from minwm.models.layout import FRAMES_PER_LATENT, LatentLayout

PIXELS_PER_LATENT = 8


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Widths at 1/2, 1/4 and 1/8 of the picture's size, and blocks at each."""

    latent_channels: int = 16
    widths: tuple[int, int, int] = (40, 80, 160)
    encoder_blocks: tuple[int, int, int] = (1, 1, 1)
    decoder_blocks: tuple[int, int, int] = (1, 2, 2)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Whose latents, and the widths and blocks, finest first, at 4, 2 and 1 times the latents' size."""

    layout: LatentLayout
    widths: tuple[int, int, int] = (64, 128, 256)
    blocks: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        if self.layout.pixels not in (8, 16):
            raise ConfigError(f"layout.pixels={self.layout.pixels}: expected 8 or 16")
        if min(self.layout.channels, *self.widths, *self.blocks) < 1:
            raise ConfigError(
                f"layout.channels={self.layout.channels}, widths={self.widths}, blocks={self.blocks}: "
                "expected positive numbers"
            )


State = tuple[Tensor, ...]
"""One tensor per block: the last frame it saw. The encoder's also holds the frames of an unfinished group."""


class _Memory:
    """Hands every layer of one pass its state in order, and collects the new ones."""

    def __init__(self, state: State | None) -> None:
        self._old = iter(state) if state is not None else None
        self.new: list[Tensor] = []

    def shift(self, x: Tensor) -> Tensor:
        """x (b, t, c, y, x) delayed by one frame; what came before the stream's start is zero."""
        before = torch.zeros_like(x[:, :1]) if self._old is None else next(self._old).to(x.dtype)
        self.new.append(x[:, -1:].detach().clone())
        return torch.cat([before, x[:, :-1]], dim=1)


def _per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    frames = layer(x.flatten(0, 1))
    return frames.reshape(*x.shape[:2], *frames.shape[1:])


class _Block(nn.Module):
    """Residual block that sees the present frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, memory: _Memory) -> Tensor:
        both = torch.cat([x, memory.shift(x)], dim=2)
        return x + _per_frame(lambda y: self.conv2(F.relu(self.conv1(F.relu(y)))), both)


class _TimeMerge(nn.Module):
    """Two frames to one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, y, z = x.shape
        return _per_frame(self.conv, x.reshape(b, t // 2, 2 * c, y, z))


class _TimeSplit(nn.Module):
    """One frame to two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, y, z = x.shape
        return _per_frame(self.conv, x).reshape(b, 2 * t, c, y, z)


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        half, quarter, eighth = config.widths
        self.stem = nn.Conv2d(12, half, 3, padding=1)
        self.fine = nn.ModuleList(_Block(half) for _ in range(config.encoder_blocks[0]))
        self.merge1 = _TimeMerge(half)
        self.down1 = nn.Conv2d(half, quarter, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(_Block(quarter) for _ in range(config.encoder_blocks[1]))
        self.merge2 = _TimeMerge(quarter)
        self.down2 = nn.Conv2d(quarter, eighth, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(_Block(eighth) for _ in range(config.encoder_blocks[2]))
        self.head = nn.Conv2d(eighth, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, memory: _Memory) -> Tensor:
        x = _per_frame(self.stem, _per_frame(lambda y: F.pixel_unshuffle(y, 2), x))
        for block in self.fine:
            x = block(x, memory)
        x = _per_frame(self.down1, self.merge1(x))
        for block in self.middle:
            x = block(x, memory)
        x = _per_frame(self.down2, self.merge2(x))
        for block in self.coarse:
            x = block(x, memory)
        return _per_frame(self.head, F.relu(x))


class TinyDecoder(nn.Module):
    """Latents to frames; the last layer gives cells of 2 × 2 pixels where a latent is 8 pixels wide, 4 × 4 where 16."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.widths
        self._cell = config.layout.pixels // 4
        self.stem = nn.Conv2d(config.layout.channels, coarse, 3, padding=1)
        self.coarse = nn.ModuleList(_Block(coarse) for _ in range(config.blocks[2]))
        self.up2 = nn.Conv2d(coarse, middle, 3, padding=1)
        self.split2 = _TimeSplit(middle)
        self.middle = nn.ModuleList(_Block(middle) for _ in range(config.blocks[1]))
        self.up1 = nn.Conv2d(middle, fine, 3, padding=1)
        self.split1 = _TimeSplit(fine)
        self.fine = nn.ModuleList(_Block(fine) for _ in range(config.blocks[0]))
        self.head = nn.Conv2d(fine, 3 * self._cell**2, 3, padding=1)

    @property
    def layout(self) -> LatentLayout:
        """What its latents stand for."""
        return self.config.layout

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Latents (b, f, c, y, x) to frames (b, 4f, 3, pixels·y, pixels·x), and the state to go on from.

        With a leading layout the first latent frame of a stream gives one frame, the last of its four. Frames
        are in [0, 1] but for small overshoots, which are left for the caller to clamp. Raises DataError when
        the latents have another number of channels.
        """
        _require_channels(latents, self.layout)
        b, f, _, y, x = latents.shape
        if f == 0:
            return latents.new_zeros(b, 0, 3, self.layout.pixels * y, self.layout.pixels * x), state or ()
        memory = _Memory(state or None)
        frames = (self._pictures(latents, memory) + 1) / 2
        if self.layout.leading and not state:
            frames = frames[:, FRAMES_PER_LATENT - 1 :]
        return frames, tuple(memory.new)

    def _pictures(self, z: Tensor, memory: _Memory) -> Tensor:
        """Four frames in [-1, 1] of every latent frame."""
        x = _per_frame(self.stem, 3 * torch.tanh(z / 3))  # soft clamp: a wild latent must not blow up
        for block in self.coarse:
            x = block(x, memory)
        x = self.split2(_per_frame(lambda y: F.interpolate(self.up2(y), scale_factor=2.0), x))
        for block in self.middle:
            x = block(x, memory)
        x = self.split1(_per_frame(lambda y: F.interpolate(self.up1(y), scale_factor=2.0), x))
        for block in self.fine:
            x = block(x, memory)
        return _per_frame(lambda y: F.pixel_shuffle(self.head(F.relu(y)), self._cell), x)


class Autoencoder(nn.Module):
    """Encoder, decoder and the latents' per-channel statistics.

    A weight file holds all three; `latent_mean` and `latent_std` are measured after training by
    `calibrate`, before which latents are not normalised.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = TinyDecoder(
            DecoderConfig(layout=self.layout, widths=config.widths, blocks=config.decoder_blocks)
        )
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @property
    def layout(self) -> LatentLayout:
        """What its latents stand for."""
        return LatentLayout(channels=self.config.latent_channels, pixels=PIXELS_PER_LATENT, leading=False)

    def encode(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Frames (b, t, 3, y, x) in [0, 1] to latents (b, f, c, y/8, x/8), and the state to go on from.

        Up to three frames that do not fill a latent frame wait in the state; `f` is then 0 for a short call.
        Raises DataError when the picture's sides are not multiples of 8.
        """
        if frames.shape[-1] % PIXELS_PER_LATENT or frames.shape[-2] % PIXELS_PER_LATENT:
            raise DataError(
                f"frames are {frames.shape[-2]}x{frames.shape[-1]}, expected sides in multiples of {PIXELS_PER_LATENT}"
            )
        waiting, memories = (state[0], state[1:]) if state else (frames[:, :0], None)
        frames = torch.cat([waiting.to(frames.dtype), frames], dim=1)
        ready = frames.shape[1] // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        if ready == 0:
            b, _, _, y, x = frames.shape
            shape = (b, 0, self.config.latent_channels, y // PIXELS_PER_LATENT, x // PIXELS_PER_LATENT)
            return frames.new_zeros(shape), (frames, *(memories or ()))
        memory = _Memory(memories or None)
        z = self.encoder(frames[:, :ready] * 2 - 1, memory)
        z = (z - _channels(self.latent_mean, z)) / _channels(self.latent_std, z)
        return z, (frames[:, ready:], *memory.new)

    def decode(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Latents (b, f, c, y, x) to frames (b, 4f, 3, 8y, 8x), and the state to go on from.

        As TinyDecoder.decode does, from normalised latents.
        """
        _require_channels(latents, self.layout)
        z = latents * _channels(self.latent_std, latents) + _channels(self.latent_mean, latents)
        return self.decoder.decode(z, state)

    def calibrate(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the statistics so that latents which come out with this mean and deviation (c,) come out normalised."""
        self.latent_mean.copy_(self.latent_mean + mean * self.latent_std)
        self.latent_std.copy_(self.latent_std * deviation)


def _channels(statistics: Tensor, like: Tensor) -> Tensor:
    return statistics.to(like.dtype)[:, None, None]


def _require_channels(latents: Tensor, layout: LatentLayout) -> None:
    if latents.shape[2] != layout.channels:
        raise DataError(f"latents have {latents.shape[2]} channels, expected {layout.channels}")
