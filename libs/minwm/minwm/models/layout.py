"""How an autoencoder's latent frames stand for RGB frames, and what every autoencoder can do.

Four RGB frames make one latent frame. The big published autoencoders give the first RGB frame a latent
frame of its own (1 + 4k); ours doesn't (4k). Streams go on from a state, so any split gives what the whole gives.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from minwm.errors import DataError

FRAMES_PER_LATENT = 4


@dataclass(frozen=True, kw_only=True)
class LatentLayout:
    """channels of a latent, pixels along the side of the square it stands for, and where the first RGB frame goes.

    leading: the first latent frame of a stream stands for one RGB frame, every later one for four
    """

    channels: int
    pixels: int
    leading: bool

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a stream of `frames` RGB frames. Raises DataError when they don't come out even."""
        lead = 1 if self.leading and frames > 0 else 0
        if (frames - lead) % FRAMES_PER_LATENT:
            raise DataError(f"frames={frames}: expected {lead} + a multiple of {FRAMES_PER_LATENT}")
        return lead + (frames - lead) // FRAMES_PER_LATENT

    def rgb_frames(self, latent_frames: int) -> int:
        """RGB frames that a stream of `latent_frames` stands for."""
        if not self.leading or latent_frames == 0:
            return FRAMES_PER_LATENT * latent_frames
        return 1 + FRAMES_PER_LATENT * (latent_frames - 1)


class VideoAutoencoder(Protocol):
    """Frames (b, t, 3, y, x) in [0, 1] to normalised latents (b, f, c, y / pixels, x / pixels), and back.

    Both directions take the state that the last call returned, None at a stream's start. A state is never
    changed once returned, so a stream can be forked by using it twice.
    """

    @property
    def layout(self) -> LatentLayout:
        """What its latents stand for."""

    def encode(self, frames: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The latent frames that are complete, and the state to go on from."""

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The RGB frames, in [0, 1] but for small overshoots, and the state to go on from."""
