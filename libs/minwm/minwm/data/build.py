"""Episodes to a dataset of clips: annotate, encode as one stream, cut, filter, write.

Poses and actions come from the source, captions from its labels. Each clip notes what annotated it.
The player's median speeds go into the manifest: live control uses them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from minwm.data.clips import KIND, Clip, clip_statistics, frames_to_mp4
from minwm.data.episode import Episode
from minwm.data.shards import Manifest, ShardWriter, read_manifest
from minwm.errors import ConfigError, DataError
from minwm.geometry.actions import from_poses
from minwm.geometry.live import Speeds
from minwm.models.autoencoder import Autoencoder
from minwm.models.layout import FRAMES_PER_LATENT

ENCODE_FRAMES = 64
CAPTION_BYTES = 64  # what presets that embed bytes take
ANNOTATORS = {"poses": "source", "actions": "poses, 81 classes", "caption": "source labels"}


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """clip_frames: latent frames a clip. heldout_every: each n-th episode is kept from training, with 1 all of them.

    max_blocked: clips where the player was commanded to move but a wall held it for more than this
    share of the latent frames are dropped, because their motion contradicts their action.
    """

    clip_frames: int = 32
    heldout_every: int = 5
    max_blocked: float = 0.25

    def __post_init__(self) -> None:
        if min(self.clip_frames, self.heldout_every) < 1:
            raise ConfigError(
                f"clips: clip_frames={self.clip_frames}, heldout_every={self.heldout_every}: expected at least 1"
            )


def build_clips(
    episodes: Iterable[Episode],
    autoencoder: Autoencoder,
    folder: Path,
    config: ClipsConfig,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Write the dataset to `folder`; `progress` is told how many episodes are done.

    Raises DataError when no clip passes the filter.
    """
    kept: list[Clip] = []
    moves, turns, dropped = _Rates(), _Rates(), 0
    with ShardWriter(folder, KIND) as writer:
        size: list[int] = []
        fps = 0.0
        for index, episode in enumerate(episodes):
            moves.add_moves(episode)
            turns.add_turns(episode)
            size, fps = list(episode.frames.shape[1:3]), episode.fps
            for clip, blocked in _cut(episode, autoencoder, config, index):
                if blocked > config.max_blocked:
                    dropped += 1
                    continue
                writer.add(clip.name, clip.to_files())
                kept.append(clip)
            if progress is not None:
                progress(index + 1)
        if kept:
            speeds = Speeds(move=moves.median(), turn=turns.median())
            writer.about = {
                **clip_statistics(kept),
                "dropped": dropped,
                "size": size,
                "fps": fps,
                "speeds": asdict(speeds),
                "annotators": ANNOTATORS,
                "config": asdict(config),
            }
    return read_manifest(folder, KIND)


@torch.inference_mode()
def encode_stream(autoencoder: Autoencoder, frames: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Frames (t, y, x, 3) to normalised latents (t // 4, c, y/8, x/8), as one stream."""
    latents, state = [], None
    parameter = next(autoencoder.parameters())
    for start in range(0, len(frames), ENCODE_FRAMES):
        piece = torch.from_numpy(frames[start : start + ENCODE_FRAMES]).to(parameter.device)
        pixels = piece.permute(0, 3, 1, 2)[None].to(parameter.dtype) / 255
        encoded, state = autoencoder.encode(pixels, state)
        latents.append(encoded[0].float().cpu().numpy().astype(np.float16))
    return np.concatenate(latents)


def _cut(episode: Episode, autoencoder: Autoencoder, config: ClipsConfig, index: int) -> Iterator[tuple[Clip, float]]:
    """The episode's clips, each with the share of its latent frames in which the player was blocked."""
    latents = encode_stream(autoencoder, episode.frames)
    if len(latents) < config.clip_frames:
        raise DataError(
            f"episode {episode.name}: has {len(latents)} latent frames, one clip needs {config.clip_frames}"
        )
    poses = episode.poses[FRAMES_PER_LATENT - 1 :: FRAMES_PER_LATENT][: len(latents)]
    blocked = _blocked(episode)[: len(latents)]
    split = "heldout" if index % config.heldout_every == config.heldout_every - 1 else "train"
    for number, start in enumerate(range(0, len(latents) - config.clip_frames + 1, config.clip_frames)):
        window = slice(start, start + config.clip_frames)
        pictures = slice(start * FRAMES_PER_LATENT, (start + config.clip_frames) * FRAMES_PER_LATENT)
        share = float(blocked[window].mean())
        clip = Clip(
            name=f"{episode.name}-{number:03d}",
            episode=episode.name,
            split=split,  # type: ignore[arg-type]
            caption=_caption(episode.scene, episode.labels[pictures]),
            latents=latents[window],
            poses=poses[window],
            intrinsics=episode.intrinsics,
            actions=from_poses(poses[window]),
            frames=frames_to_mp4(episode.frames[pictures], episode.fps),
            notes={"annotators": ANNOTATORS, "pose_error": 0.0, "blocked_share": share},
        )
        yield clip, share


def _caption(scene: str, labels: Sequence[Sequence[str]]) -> str:
    """The scene and as many of its most seen objects as fit, such as `freedoom1 e2m1: green torch, shell`."""
    seen = Counter(name for names in labels for name in names)
    words = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name, _ in seen.most_common(3)]
    place = scene.replace(":", " ").lower()
    captions = (f"{place}: {', '.join(words[:count])}" for count in range(len(words), 0, -1))
    short = place.encode()[:CAPTION_BYTES].decode(errors="ignore")
    return next((caption for caption in captions if len(caption.encode()) <= CAPTION_BYTES), short)


def _speeds(episode: Episode) -> NDArray[np.float64]:
    """World units a second, frame by frame; the first frame has none before it and counts as still."""
    steps = np.linalg.norm(np.diff(episode.poses[:, :3, 3], axis=0), axis=-1)
    return np.concatenate([[0.0], steps]) * episode.fps


def _blocked(episode: Episode) -> NDArray[np.bool_]:
    """Per latent frame: commanded to walk, and at less than a third of the commanded speed."""
    wanted = np.linalg.norm(episode.commands[:, :2], axis=-1)
    usable = len(wanted) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    wanted, real = (x[:usable].reshape(-1, FRAMES_PER_LATENT).mean(1) for x in (wanted, _speeds(episode)))
    return np.asarray((wanted > 0) & (real < wanted / 3))


class _Rates:
    """Collects speeds of commanded, unblocked motion."""

    def __init__(self) -> None:
        self._values: list[NDArray[np.float64]] = []

    def add_moves(self, episode: Episode) -> None:
        """World units/s while walking freely."""
        wanted = np.linalg.norm(episode.commands[:, :2], axis=-1)
        real = _speeds(episode)
        self._values.append(real[(wanted > 0) & (real > wanted / 3)])

    def add_turns(self, episode: Episode) -> None:
        """Degrees/s while turning."""
        turning = np.abs(episode.commands[:, 2])
        self._values.append(turning[turning > 0].astype(np.float64))

    def median(self) -> float:
        """The median. Raises DataError when nothing was collected."""
        values = np.concatenate(self._values)
        if not len(values):
            raise DataError("the episodes hold no free motion to measure speeds from")
        return round(float(np.median(values)), 3)
