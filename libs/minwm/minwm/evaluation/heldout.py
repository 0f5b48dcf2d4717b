"""What is evaluated, and on what: a world opened from one folder or two, and play that no training has seen.

Recordings are VizDoom's, walked with seeds of their own; every clip is held out. Maps that training knew say how well a
model remembers, an unseen one how well it goes on from what it is given.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from minwm.data.build import ClipsConfig, build_clips
from minwm.data.clips import KIND, load_clips
from minwm.data.shards import MANIFEST, read_manifest
from minwm.errors import CheckpointError, ConfigError
from minwm.evaluation.evaluate import Bars
from minwm.geometry.live import Speeds
from minwm.models.backbones import load_backbone
from minwm.models.checkpoints import load_autoencoder
from minwm.models.worlds import WORLD, World, WorldCard, load_world

_SEED = 9_001  # of the walks; training's seeds are small numbers


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """What is recorded. size: pixels (y, x), where no world says it. episode_frames: RGB frames of each recording."""

    scenes: tuple[str, ...] = ("freedoom1:E1M2", "freedoom1:E1M3", "freedoom1:E2M1", "freedoom1:E3M1")
    episodes_per_scene: int = 1
    episode_frames: int = 576
    clip_frames: int = 24
    size: tuple[int, int] = (144, 192)


def open_world(folder: Path, autoencoder: Path | None, data: Path) -> World:
    """The world in a folder; or, where the folder is a backbone's, one of it, the autoencoder and the dataset's card.

    Raises ConfigError when the autoencoder is missing, or there is one too many.
    """
    if (folder / WORLD).is_file():
        if autoencoder is not None:
            raise ConfigError(f"--autoencoder {autoencoder}: {folder} is a world, which has its own")
        return load_world(folder)
    if autoencoder is None:
        raise CheckpointError(f"{folder}: has no {WORLD}; a backbone's folder needs --autoencoder")
    backbone = load_backbone(folder, torch.bfloat16)
    backbone.model.eval().requires_grad_(False)
    clips, manifest = load_clips(data, "heldout")
    height, width = manifest.about["size"]
    fx, fy, cx, cy = (float(value) for value in clips[0].intrinsics)
    card = WorldCard(
        name=backbone.config.preset,
        height=height,
        width=width,
        fps=manifest.about["fps"],
        intrinsics=(fx, fy, cx, cy),
        speeds=Speeds(**manifest.about["speeds"]),
    )
    return World(card, backbone, load_autoencoder(autoencoder, torch.bfloat16).requires_grad_(False), {})


def record_heldout(folder: Path, world: Path, autoencoder: Path | None, config: HeldoutConfig, bars: Bars) -> None:
    """Play, and write clips encoded with the world's autoencoder to `folder`; does nothing where a dataset lies."""
    from minwm.data.doom import DoomConfig, record

    if (folder / MANIFEST).is_file():
        read_manifest(folder, KIND)
        return
    height, width = config.size
    if (world / WORLD).is_file():
        card = load_world(world).card
        height, width, autoencoder = card.height, card.width, world / "autoencoder"
    if autoencoder is None:
        raise CheckpointError(f"{world}: has no {WORLD}; a backbone's folder needs --autoencoder")
    game = DoomConfig(
        scenes=config.scenes,
        episodes=config.episodes_per_scene * len(config.scenes),
        frames_per_episode=config.episode_frames,
        height=height,
        width=width,
        seed=_SEED,
    )
    model = load_autoencoder(autoencoder, torch.bfloat16)
    with bars("recording", game.episodes) as report:
        build_clips(record(game), model, folder, ClipsConfig(clip_frames=config.clip_frames, heldout_every=1), report)
