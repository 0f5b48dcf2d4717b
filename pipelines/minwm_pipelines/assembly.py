"""A trained backbone made into a world that can be served, with pictures to start from."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minwm.data.clips import Clip, load_clips
from minwm.geometry.live import Speeds
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.worlds import WorldCard, save_world

_STARTS = 4


def assemble(folder: Path, name: str, backbone: Path, autoencoder: Path, data: Path) -> None:
    """Write the world `name`; its size, pace and speeds are the dataset's."""
    clips, manifest = load_clips(data, "heldout")
    height, width = manifest.about["size"]
    fx, fy, cx, cy = (float(value) for value in clips[0].intrinsics)
    card = WorldCard(
        name=name,
        height=height,
        width=width,
        fps=manifest.about["fps"],
        intrinsics=(fx, fy, cx, cy),
        speeds=Speeds(**manifest.about["speeds"]),
    )
    spread = clips[:: max(1, len(clips) // _STARTS)][:_STARTS]
    save_world(folder, card, backbone, autoencoder, {clip.name: start_picture(clip) for clip in spread})


def start_picture(clip: Clip) -> NDArray[np.uint8]:
    """The clip's frame (y, x, 3) with most room ahead: from where the player then came furthest straight on.

    One who faces a wall sees little of the world, and live control knows no walls.
    """
    places, ahead = clip.poses[:, :3, 3], clip.poses[:, :3, 2]
    ways = places[None] - places[:, None]  # from frame i to frame j
    reach = np.triu(np.einsum("ijk,ik->ij", ways, ahead)).max(1)
    return np.asarray(clip.video()[int(reach.argmax()) * FRAMES_PER_LATENT + FRAMES_PER_LATENT - 1])
