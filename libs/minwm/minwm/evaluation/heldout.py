"""What is evaluated, and on what: a world opened from one folder or two, and play that no training has seen.

Recordings are VizDoom's, walked with seeds of their own; every clip is held out. Maps that training knew say how well a
model remembers, an unseen one how well it goes on from what it is given.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minwm.artifacts.store import folder_digest
from minwm.config import build
from minwm.data.build import ClipsConfig, build_clips
from minwm.data.clips import load_clips
from minwm.data.shards import MANIFEST
from minwm.errors import CheckpointError, ConfigError
from minwm.evaluation.evaluate import Bars
from minwm.geometry.live import Speeds
from minwm.models.backbones import load_backbone
from minwm.models.checkpoints import load_autoencoder, read_json
from minwm.models.layout import FRAMES_PER_LATENT
from minwm.models.worlds import WORLD, World, WorldCard, load_world
from minwm.precision import native_dtype

_LARGEST_CHUNK = 4
_SEED = 9_001  # of the walks; training's seeds are small numbers


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """What is recorded.

    scenes: `wad:map`; the last one is of no training
    size: pixels (y, x), where no world says it
    episode_frames: RGB frames of each recording
    max_blocked: share of a clip that a wall may hold the player
    """

    scenes: tuple[str, ...] = (*(f"freedoom1:E1M{level}" for level in (3, 5, 6)), "freedoom1:E1M4")
    episodes_per_scene: int = 1
    episode_frames: int = 576
    clip_frames: int = 24
    max_blocked: float = 0.25
    size: tuple[int, int] = (96, 128)

    def lasting(self, seconds: float) -> "HeldoutConfig":
        """The same play, each recording one clip of so many seconds after a chunk of at most four latent frames."""
        from minwm.data.doom import FPS

        frames = math.ceil(seconds * FPS / FRAMES_PER_LATENT) + 2 * _LARGEST_CHUNK
        return replace(self, episode_frames=frames * FRAMES_PER_LATENT, clip_frames=frames, max_blocked=1.0)


def open_world(folder: Path, autoencoder: Path | None, data: Path, steps: int | None = None) -> World:
    """The world in a folder; or, where the folder is a backbone's, one of it, the autoencoder and the dataset's card.

    It samples in `steps`, if given. Raises CheckpointError when the autoencoder is missing, ConfigError when there is
    one too many or the steps are not offered.
    """
    if _is_world(folder, autoencoder):
        world = load_world(folder)
    else:
        assert autoencoder is not None, "a backbone's folder has an autoencoder beside it"
        world = _assemble(folder, autoencoder, data)
    card = world.card if steps is None else replace(world.card, steps=steps)
    world.backbone.config.sampling_levels(card.steps)
    return replace(world, card=card)


def _is_world(folder: Path, autoencoder: Path | None) -> bool:
    """Whether it is a world's folder rather than a backbone's that has an autoencoder beside it."""
    whole = (folder / WORLD).is_file()
    if whole and autoencoder is not None:
        raise ConfigError(f"--autoencoder {autoencoder}: {folder} is a world, which has its own")
    if not whole and autoencoder is None:
        raise CheckpointError(
            f"{folder}: not a world model (it has no {WORLD}); a backbone's folder needs --autoencoder"
        )
    return whole


def _assemble(folder: Path, autoencoder: Path, data: Path) -> World:
    backbone = load_backbone(folder, native_dtype())
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
    return World(card, backbone, load_autoencoder(autoencoder, native_dtype()).requires_grad_(False), {})


def record_heldout(folder: Path, world: Path, autoencoder: Path | None, config: HeldoutConfig, bars: Bars) -> Path:
    """Play, and write clips encoded with the world's autoencoder to a folder under `folder`, which is returned.

    Its name is a digest of all that goes into it: what lies there already is what playing again would give.
    """
    from minwm.data.doom import DoomConfig, record

    height, width = config.size
    if _is_world(world, autoencoder):
        card, encoder = build(WorldCard, read_json(world / WORLD), str(world / WORLD)), world / "autoencoder"
        height, width = card.height, card.width
    else:
        assert autoencoder is not None, "a backbone's folder has an autoencoder beside it"
        encoder = autoencoder
    game = DoomConfig(
        scenes=config.scenes,
        episodes=config.episodes_per_scene * len(config.scenes),
        frames_per_episode=config.episode_frames,
        height=height,
        width=width,
        seed=_SEED,
    )
    identity = json.dumps([asdict(game), config.clip_frames, config.max_blocked, folder_digest(encoder)])
    data = folder / hashlib.sha256(identity.encode()).hexdigest()[:12]
    if not (data / MANIFEST).is_file():
        model = load_autoencoder(encoder, native_dtype())
        cut = ClipsConfig(clip_frames=config.clip_frames, heldout_every=1, max_blocked=config.max_blocked)
        with bars("recording", game.episodes) as report:
            build_clips(record(game), model, data, cut, report)
    return data
