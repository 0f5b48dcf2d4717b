"""The judge of generated video, trained on play: camera motions, what is in view, and which map it is.

A sample is five frames of an episode, mirrored and played backwards half of the time each, and slowed down in four of
ten (a player turns at one speed only, which an estimator must not learn by heart); their motion follows. Of two places
drawn, the sample is taken where the camera moves farther to a side: that is rare in play, and looks much like a turn.
Generated pictures are softer and dirtier than the game's, so samples are blurred, quantised in blocks as JPEG does,
made noisy, and changed in contrast, brightness and colour; the labels and motions stay.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from minwm.data.episode import Episode, iterate_episodes
from minwm.data.shards import read_manifest
from minwm.errors import ConfigError, DataError
from minwm.evaluation.judge import WINDOW, Judge, JudgeConfig, save_judge, shrink, true_motions
from minwm.training.draw import Draw

_BLOCK = 8  # pixels along the side of a block that is quantised
_KERNEL = 4  # pixels to each side that a blur reaches
_STEADY = 0.1  # of a motion's scale: below, errors count squared, above by their size
_LEAST = 1e-3


@dataclass(frozen=True, kw_only=True)
class Damage:
    """The most a sample is damaged; each kind is drawn by itself, from none up to this.

    blur:   standard deviation, pixels of 72 × 96        blocks: step of the finest quantised coefficient, in [0, 1]
    noise:  standard deviation, in [0, 1]                tone:   change of contrast, brightness and colours, a share
    """

    blur: float = 1.6
    blocks: float = 0.12
    noise: float = 0.06
    tone: float = 0.25

    def __post_init__(self) -> None:
        if min(self.blur, self.blocks, self.noise) < 0 or not 0 <= self.tone < 1:
            raise ConfigError(f"damage: {self}: expected no negative number, and a tone below 1")


@dataclass(frozen=True, kw_only=True)
class JudgeStageConfig:
    """heldout_every: each n-th episode is kept from training. label_episodes: names seen in fewer are not learned."""

    heldout_every: int = 6
    label_episodes: int = 8
    damage: Damage = Damage()
    label_weight: float = 1.0
    scene_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.heldout_every < 2 or self.label_episodes < 1:
            raise ConfigError(
                f"heldout_every={self.heldout_every}, label_episodes={self.label_episodes}: expected at least 2 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class Play:
    """An episode as the judge sees it: frames (t, 72, 96, 3) uint8, poses (t, 4, 4), names in view per frame."""

    frames: NDArray[np.uint8]
    poses: NDArray[np.float64]
    labels: list[list[str]]
    scene: str


@dataclass(frozen=True)
class JudgeBatch:
    """frames (b, 5, 3, 72, 96) in [0, 1], motions (b, 4), labels (b, ·) of 0 and 1, scenes (b,) by number."""

    frames: Tensor
    motions: Tensor
    labels: Tensor
    scenes: Tensor


def load_play(folder: Path, heldout_every: int) -> tuple[list[Play], str]:
    """The episodes of a dataset that are trained on, and the dataset's digest."""
    plays = [
        play_of(episode)
        for index, episode in enumerate(iterate_episodes(folder))
        if index % heldout_every != heldout_every - 1
    ]
    return plays, read_manifest(folder, "episodes").digest()


def play_of(episode: Episode) -> Play:
    """The episode in small. Raises DataError when it has no five frames."""
    if len(episode.frames) < WINDOW:
        raise DataError(f"episode {episode.name}: has {len(episode.frames)} frames, expected {WINDOW} or more")
    return Play(frames=shrink(episode.frames), poses=episode.poses, labels=episode.labels, scene=episode.scene)


def known_labels(plays: Iterable[Play], least: int) -> tuple[str, ...]:
    """The names seen in at least `least` episodes; sorted."""
    seen = Counter(name for play in plays for name in {name for names in play.labels for name in names})
    return tuple(sorted(name for name, episodes in seen.items() if episodes >= least))


class JudgeStage:
    """Trains a judge from random weights to know the labels and scenes of `plays`."""

    def __init__(self, config: JudgeStageConfig, plays: Sequence[Play], seed: int) -> None:
        torch.manual_seed(seed)
        self._config = config
        self._known = JudgeConfig(
            labels=known_labels(plays, config.label_episodes), scenes=tuple(sorted({play.scene for play in plays}))
        )
        self.model = Judge(self._known).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: Mapping[str, nn.Module] = {"judge": self.model}
        self.frozen: Mapping[str, nn.Module] = {}
        self.fixed: Mapping[str, nn.Module] = {}

    def turns(self, step: int) -> Sequence[str]:
        return ("judge",)

    def prepare(self, samples: Sequence[Play], draw: Draw) -> JudgeBatch:
        frames, motions, labels, scenes = [], [], [], []
        for play, (*places, mirror, reverse, pace) in zip(samples, draw.uniform("window", (5,)), strict=True):
            slow = np.linspace(0, min(WINDOW - 1, int(pace * 2 * WINDOW)), WINDOW)
            paced = slow.round().astype(int)[:: -1 if reverse < 0.5 else 1]
            orders = [int(place * (len(play.frames) - WINDOW + 1)) + paced for place in places]
            moved = [true_motions(play.poses[order[[0, -1]]])[0] for order in orders]
            order, motion = max(zip(orders, moved, strict=True), key=lambda chosen: abs(chosen[1][0]))
            flip = -1 if mirror < 0.5 else 1
            frames.append(torch.from_numpy(play.frames[order][:, :, ::flip].copy()))
            motions.append(motion * (flip, 1, 1, flip))
            labels.append([name in play.labels[order[-1]] for name in self._known.labels])
            scenes.append(self._known.scenes.index(play.scene))
        pictures = torch.stack(frames).permute(0, 1, 4, 2, 3).float() / 255
        return JudgeBatch(
            damaged(pictures, draw, self._config.damage),
            torch.from_numpy(np.stack(motions)).float(),
            torch.tensor(labels, dtype=torch.float32),
            torch.tensor(scenes),
        )

    def loss(self, turn: str, batch: JudgeBatch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Absolute errors of motions (squared where small), cross entropies of labels and of the scene."""
        judged = self.model(batch.frames)
        off = (judged.motions - batch.motions) / torch.tensor(self._known.scale)
        motion = F.smooth_l1_loss(off, torch.zeros_like(off), beta=_STEADY)
        label = F.binary_cross_entropy_with_logits(judged.labels.float(), batch.labels)
        scene = F.cross_entropy(judged.scenes.float(), batch.scenes)
        loss = motion + self._config.label_weight * label + self._config.scene_weight * scene
        right, forward, _, yaw = (judged.motions - batch.motions).detach().abs().mean(0).tolist()
        figures = {"right_error": right, "forward_error": forward, "yaw_error": yaw}
        return loss, {**figures, "label_entropy": float(label.detach()), "scene_entropy": float(scene.detach())}

    def after_step(self, step: int) -> None:
        pass

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        save_judge(folder, self.model, about)


def damaged(frames: Tensor, draw: Draw, most: Damage) -> Tensor:
    """Frames (b, t, 3, y, x) in [0, 1], y and x multiples of 8, blurred, quantised, noisy and toned; by sample."""
    blur, blocks, noise = (
        strength.clamp(min=0) * bound
        for strength, bound in zip(
            (2 * draw.uniform("damage", (3,)) - 1).unbind(1), (most.blur, most.blocks, most.noise), strict=True
        )
    )
    frames = _toned(frames, draw, most.tone)
    frames = _blurred(frames, blur)
    hit = (blocks > 0).nonzero()[:, 0]
    frames[hit] = _quantised(frames[hit], blocks[hit])
    return frames.addcmul_(noise[:, None, None, None, None], draw.normal("noise", frames.shape[1:]))


def _toned(frames: Tensor, draw: Draw, most: float) -> Tensor:
    """Contrast, brightness and colour balance change for a sample, and by a tenth of that from frame to frame."""
    t = frames.shape[1]
    sample = 2 * draw.uniform("tone", (1, 5)) - 1
    change = 1 + most * (sample + 0.1 * draw.normal("flicker", (t, 5)))[..., None, None]
    contrast, light = change[:, :, :1], change[:, :, 1:2] * (1 + 0.4 * (change[:, :, 2:] - 1))
    mean = frames.mean((2, 3, 4), keepdim=True)
    return torch.addcmul(light * mean * (1 - contrast), frames, light * contrast)


def _blurred(frames: Tensor, deviation: Tensor) -> Tensor:
    """A Gaussian blur of standard deviation (b,) in pixels."""
    b, t, c = frames.shape[:3]
    places = torch.arange(-_KERNEL, _KERNEL + 1)
    kernel = torch.softmax(-0.5 * (places / deviation.clamp(min=_LEAST)[:, None]) ** 2, dim=1)
    across = frames.flatten(1, 2).transpose(0, 1)  # (t·c, b, y, x): a channel for each sample
    across = F.conv2d(F.pad(across, (_KERNEL,) * 4, mode="replicate"), kernel[:, None, None, :], groups=b)
    down = F.conv2d(across, kernel[:, None, :, None], groups=b)
    blurred: Tensor = down.transpose(0, 1).unflatten(1, (t, c))
    return blurred


def _quantised(frames: Tensor, step: Tensor) -> Tensor:
    """Cosine coefficients of blocks of 8 × 8 rounded to multiples of `step` (b,), coarser the higher they are."""
    places = torch.arange(_BLOCK)
    basis = torch.cos(math.pi / _BLOCK * (places + 0.5) * places[:, None]) * math.sqrt(2 / _BLOCK)
    basis[0] /= math.sqrt(2)
    size = frames.shape[-2] // _BLOCK, frames.shape[-1] // _BLOCK
    blocks = frames.unflatten(-1, (size[1], _BLOCK)).unflatten(-3, (size[0], _BLOCK)).transpose(-3, -2)
    steps = step[:, None, None, None, None, None, None] * (1 + places + places[:, None])
    rounded = (basis @ blocks @ basis.T / steps).round() * steps
    restored: Tensor = basis.T @ rounded @ basis
    return restored.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
