"""A small network that judges game video, real or generated: how the camera moved, and what is to be seen.

It reads five RGB frames, the last one of a group of four and the four of the next: their motion is the one between
two latent frames' poses. What it computes on the way serves as the feature space of a Fréchet video distance and of a
perceptual distance. It is trained on play (minwm.training.judge) and shares nothing with any generator.

Frames are (t, y, x, 3) uint8 RGB of any size; they are looked at in 72 × 96 pixels. A motion is (4,): right, forward,
down in world units along the earlier camera's axes, and yaw to the right in degrees.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from minwm.config import build
from minwm.errors import ConfigError, DataError
from minwm.geometry.camera import require_rigid
from minwm.models.checkpoints import load_weights, read_config, save_model
from minwm.models.layout import FRAMES_PER_LATENT

SIZE = (72, 96)  # pixels (y, x) that the network looks at
WINDOW = FRAMES_PER_LATENT + 1  # RGB frames that one motion spans
LEAST_CLIP = 8  # RGB frames
LEAST_TURN = 1.0  # degrees per latent frame that have a side
LEAST_MOVE = 0.25  # world units per latent frame that have a direction: a quarter of walking
_MIRRORED = (-1, 1, 1, -1)  # what a mirror does to a motion
_CELL = 3  # pixels of 72 × 96 along the side of the finest maps' cells
_REACH = (2, 3)  # cells (y, x) that a thing may move between two frames
_DESCRIPTOR = 16  # channels in which cells are compared
_TEMPERATURE = 0.1  # of the softmax over shifts
_NARROW = 32  # channels of the trunk's last maps, which are flattened
_BATCH = 32  # windows at a time, when a clip is judged
_SMALL = 1e-6


class MotionEstimator(Protocol):
    """Sees how the camera moved."""

    def motions(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The motions (t/4 − 1, 4) between the last frames of consecutive groups of four of `frames` (t, y, x, 3)."""


class FeatureExtractor(Protocol):
    """A feature space in which videos and pictures can be compared."""

    def clip_features(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        """One vector (d,) of a clip of eight frames or more, for a Fréchet distance between sets of clips."""

    def frame_features(self, frames: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Maps (t, c, y, x) of each frame by itself, fine to coarse, of unit length along c."""

    def perceptual(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The distance (t,) between the frames of `a` and those of `b`; 0 for equal ones."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """labels: names of things it tells apart; scenes: the `wad:map` it tells apart.

    widths:   channels of maps of 24 × 32, 12 × 16 and 6 × 8 cells
    trunk:    channels where appearance and motion have met
    features: length of the vector that everything is read from
    scale:    the motion that counts as one: right, forward, down (world units), yaw (degrees)
    """

    labels: tuple[str, ...]
    scenes: tuple[str, ...]
    widths: tuple[int, int, int] = (32, 64, 96)
    trunk: int = 96
    features: int = 128
    scale: tuple[float, float, float, float] = (0.5, 0.5, 0.1, 5.0)

    def __post_init__(self) -> None:
        if min(*self.widths, self.trunk) < 8 or any(width % 8 for width in (*self.widths, self.trunk)):
            raise ConfigError(f"widths={self.widths}, trunk={self.trunk}: expected multiples of 8")
        if not self.labels or not self.scenes or min(self.scale) <= 0:
            raise ConfigError("judge: expected at least one label and one scene, and scales above 0")


@dataclass(frozen=True)
class Judgement:
    """What the network says of windows: motions (b, 4), logits of labels and of scenes (b, ·), features (b, d)."""

    motions: Tensor
    labels: Tensor
    scenes: Tensor
    features: Tensor


class Judge(nn.Module):
    """A MotionEstimator and a FeatureExtractor.

    Pictures are encoded each by itself; consecutive ones are compared cell by cell (the correlation layer of FlowNet,
    arXiv:1504.06852), which also gives a coarse flow; a trunk puts that together with what the last picture shows.
    """

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.widths
        shifts = (2 * _REACH[0] + 1) * (2 * _REACH[1] + 1)
        self.fine = nn.Sequential(_conv(3 * _CELL**2, fine), _conv(fine, fine))
        self.middle = nn.Sequential(_conv(fine, middle, stride=2), _conv(middle, middle))
        self.coarse = nn.Sequential(_conv(middle, coarse, stride=2), _conv(coarse, coarse))
        self.describe = nn.Conv2d(fine, _DESCRIPTOR, 1)
        self.compared = _plain_conv(shifts + 2, fine, stride=2)
        self.meet = _plain_conv((WINDOW - 1) * fine + middle, config.trunk, stride=2)
        self.mix = _plain_conv(config.trunk + coarse, config.trunk)
        self.narrow = _plain_conv(config.trunk, _NARROW)
        cells = SIZE[0] * SIZE[1] // (4 * _CELL) ** 2
        self.features = nn.Sequential(nn.Linear((_NARROW + 2 * (WINDOW - 1)) * cells, config.features), nn.ReLU())
        self.motion = nn.Linear(config.features, 4)
        self.label = nn.Linear(config.features, len(config.labels))
        self.scene = nn.Linear(config.features, len(config.scenes))

    def forward(self, frames: Tensor) -> Judgement:
        """Judge windows (b, 5, 3, 72, 96) of frames in [0, 1]; labels and scenes are those of the last frame."""
        b, t = frames.shape[:2]
        fine = self.fine(_cells(frames.flatten(0, 1)))
        described = _unit(F.instance_norm(self.describe(fine))).unflatten(0, (b, t))
        products = correlation(described[:, :-1].flatten(0, 1), described[:, 1:].flatten(0, 1), _REACH)
        flow = soft_flow(products, _REACH)
        compared = self.compared(torch.cat([products, flow], dim=1)).unflatten(0, (b, t - 1)).flatten(1, 2)
        middle = self.middle(fine.unflatten(0, (b, t))[:, -1])
        met = self.meet(torch.cat([compared, middle], dim=1))
        trunk = self.narrow(self.mix(torch.cat([met, self.coarse(middle)], dim=1)))
        flows = F.avg_pool2d(flow.unflatten(0, (b, t - 1)).flatten(1, 2), 4)
        features = self.features(torch.cat([trunk, flows], dim=1).flatten(1))
        scale = torch.tensor(self.config.scale, device=features.device)
        return Judgement(self.motion(features).float() * scale, self.label(features), self.scene(features), features)

    def motions(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        """As MotionEstimator; the mean of what the frames and their mirror images say, so neither side is favoured.

        Raises DataError unless `t` is a multiple of four, eight or more.
        """
        if len(frames) % FRAMES_PER_LATENT:
            raise DataError(f"frames: got {len(frames)}, expected a multiple of {FRAMES_PER_LATENT}")
        plain, mirrored = (
            torch.cat([judged.motions for judged in self._judged(seen, first=FRAMES_PER_LATENT - 1)])
            for seen in (frames, frames[:, :, ::-1])
        )
        return ((plain + mirrored * plain.new_tensor(_MIRRORED)) / 2).double().cpu().numpy()

    def clip_features(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        """As FeatureExtractor: the mean over windows of five frames, one every four frames from the clip's first.

        70 frames (4 s) have 17 windows; of another length, frames that don't fill a window are left out. Raises
        DataError for fewer than eight frames.
        """
        return torch.cat([judged.features for judged in self._judged(frames)]).double().mean(0).cpu().numpy()

    def recognise(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities of labels (k, ·) and of scenes (k, ·) at the end of each window of `clip_features`."""
        judged = list(self._judged(frames))
        labels = torch.cat([part.labels for part in judged]).double().sigmoid()
        scenes = torch.cat([part.scenes for part in judged]).double().softmax(-1)
        return labels.cpu().numpy(), scenes.cpu().numpy()

    def frame_features(self, frames: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """As FeatureExtractor, of 24 × 32, 12 × 16 and 6 × 8 cells."""
        return [maps.cpu().numpy() for maps in self._frame_maps(frames)]

    def perceptual(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
        """As FeatureExtractor: squared distances of unit features, averaged over places and scales, in [0, 4].

        LPIPS without its learned weights (arXiv:1801.03924, equation 1). Raises DataError for unequal lengths.
        """
        if len(a) != len(b):
            raise DataError(f"perceptual: got {len(a)} and {len(b)} frames, expected equally many")
        scales = zip(self._frame_maps(a), self._frame_maps(b), strict=True)
        distances = [(left - right).double().square().sum(1).mean((1, 2)) for left, right in scales]
        return torch.stack(distances).mean(0).cpu().numpy()

    @torch.inference_mode()
    def _judged(self, frames: NDArray[np.uint8], first: int = 0) -> Iterator[Judgement]:
        """Judgements, in batches, of the windows that start at `first` and at every fourth frame after it."""
        if len(frames) < LEAST_CLIP:
            raise DataError(f"frames: got {len(frames)}, expected {LEAST_CLIP} or more")
        pictures = self._pictures(frames)
        starts = range(first, len(frames) - WINDOW + 1, FRAMES_PER_LATENT)
        for place in range(0, len(starts), _BATCH):
            yield self(torch.stack([pictures[start : start + WINDOW] for start in starts[place : place + _BATCH]]))

    @torch.inference_mode()
    def _frame_maps(self, frames: NDArray[np.uint8]) -> list[Tensor]:
        scales = []
        for pictures in self._pictures(frames).split(_BATCH):
            fine = self.fine(_cells(pictures))
            middle = self.middle(fine)
            scales.append([_unit(maps.float()) for maps in (fine, middle, self.coarse(middle))])
        return [torch.cat(maps) for maps in zip(*scales, strict=True)]

    def _pictures(self, frames: NDArray[np.uint8]) -> Tensor:
        """(t, 3, 72, 96) in [0, 1]."""
        device = self.motion.weight.device
        return torch.from_numpy(shrink(frames).copy()).to(device).permute(0, 3, 1, 2).float() / 255


def shrink(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames (t, y, x, 3) in the size the network looks at, (t, 72, 96, 3). Raises DataError for another shape."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise DataError(f"frames: got {frames.dtype} {frames.shape}, expected uint8 (t, y, x, 3)")
    if frames.shape[1:3] == SIZE:
        return frames
    pictures = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)
    small = F.interpolate(pictures, SIZE, mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).contiguous().numpy()


def correlation(first: Tensor, second: Tensor, reach: tuple[int, int]) -> Tensor:
    """Products of each cell of `first` (b, c, y, x) and those of `second` up to `reach` (y, x) cells away.

    (b, (2·reach_y + 1)·(2·reach_x + 1), y, x), shifts row by row from up left to down right; 0 beyond the edge.
    """
    rise, run = reach
    height, width = first.shape[-2:]
    rows = first.permute(0, 2, 3, 1)
    other = F.pad(second, (run, run, rise, rise)).permute(0, 2, 1, 3)
    bands = []
    for down in range(2 * rise + 1):
        products = rows @ other[:, down : down + height]  # (b, y, x, x + 2·run)
        # One more column per row, and what lay on the diagonal from (0, k) to (x, x + k) lies in column k.
        skewed = F.pad(products.flatten(2), (0, width)).unflatten(2, (width, width + 2 * run + 1))
        bands.append(skewed[..., : 2 * run + 1])
    return torch.cat(bands, dim=-1).permute(0, 3, 1, 2)


def soft_flow(products: Tensor, reach: tuple[int, int]) -> Tensor:
    """Where each cell went, (b, 2, y, x), down and right in cells: the mean shift, weighted by exp(product / 0.1)."""
    rise, run = reach
    weights = (products / _TEMPERATURE).softmax(1).unflatten(1, (2 * rise + 1, 2 * run + 1))
    down = torch.arange(-rise, rise + 1, device=products.device)[:, None, None]
    right = torch.arange(-run, run + 1, device=products.device)[:, None, None]
    return torch.stack([(weights.sum(2) * down).sum(1), (weights.sum(1) * right).sum(1)], dim=1)


def true_motions(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The motions (f − 1, 4) between camera-to-world poses (f, 4, 4). Raises DataError for poses that aren't rigid."""
    require_rigid(poses)
    back = poses[:-1, :3, :3].swapaxes(1, 2)
    right, down, forward = (back @ (poses[1:, :3, 3:] - poses[:-1, :3, 3:]))[..., 0].T
    ahead = (back @ poses[1:, :3, :3])[..., 2]
    yaw = np.degrees(np.arctan2(ahead[:, 0], ahead[:, 2]))
    return np.stack([right, forward, down, yaw], axis=1)


@dataclass(frozen=True, kw_only=True)
class MotionError:
    """How far estimated motions are from true ones; a share or mean over nothing is NaN.

    turn_direction:       share of `turns`, motions of more than 1° of yaw, estimated to the right side
    move_direction:       share of `moves`, of more than 0.25 world units over ground, estimated less than 45° off
    rotation_error_deg:   mean absolute error of yaw over all `motions`; rotation_relative: over mean absolute yaw
    translation_error:    mean length of the error over ground, world units; translation_relative: over mean length
    turn_relative, move_relative: the same ratios, over the turns and over the moves alone
    """

    turn_direction: float
    move_direction: float
    rotation_error_deg: float
    rotation_relative: float
    translation_error: float
    translation_relative: float
    turn_relative: float
    move_relative: float
    turns: int
    moves: int
    motions: int


def motion_error(estimated: NDArray[np.float64], true: NDArray[np.float64]) -> MotionError:
    """Compare motions (n, 4) with the true ones. Raises DataError when there are none, or not equally many."""
    if estimated.shape != true.shape or true.shape[1:] != (4,) or not len(true):
        raise DataError(f"motions: got {estimated.shape} and {true.shape}, expected twice the same (n, 4), n above 0")
    yaw, ground = true[:, 3], true[:, :2]
    length = np.linalg.norm(ground, axis=1)
    turns, moves = np.abs(yaw) > LEAST_TURN, length > LEAST_MOVE
    along = (estimated[:, :2] * ground).sum(1)
    near = along > np.sqrt(0.5) * length * np.linalg.norm(estimated[:, :2], axis=1)
    turned, missed = np.abs(estimated[:, 3] - yaw), np.linalg.norm(estimated[:, :2] - ground, axis=1)
    return MotionError(
        turn_direction=_mean((estimated[:, 3] * yaw > 0)[turns]),
        move_direction=_mean(near[moves]),
        rotation_error_deg=_mean(turned),
        rotation_relative=_ratio(turned, np.abs(yaw)),
        translation_error=_mean(missed),
        translation_relative=_ratio(missed, length),
        turn_relative=_ratio(turned[turns], np.abs(yaw[turns])),
        move_relative=_ratio(missed[moves], length[moves]),
        turns=int(turns.sum()),
        moves=int(moves.sum()),
        motions=len(true),
    )


def estimator_error(
    estimator: MotionEstimator, clips: Iterable[tuple[NDArray[np.uint8], NDArray[np.float64]]]
) -> MotionError:
    """The estimator's own error on real clips: frames (4·f, y, x, 3), and poses (f, 4, 4) of every fourth's camera."""
    pairs = [(estimator.motions(frames), true_motions(poses)) for frames, poses in clips]
    if not pairs:
        raise DataError("clips: got none, expected at least one")
    estimated, true = (np.concatenate(motions) for motions in zip(*pairs, strict=True))
    return motion_error(estimated, true)


def average_precision(scores: NDArray[np.float64], true: NDArray[np.bool_]) -> float:
    """The mean precision (n,) at each true item when the items are ranked by score, best first; NaN without any."""
    hits = true[np.argsort(-scores, kind="stable")]
    return _mean((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits])


def save_judge(folder: Path, judge: Judge, about: Mapping[str, Any] | None = None) -> None:
    """Write a judge's folder, in bf16."""
    save_model(folder, judge, kind="judge", config=judge.config, about=about)


def load_judge(folder: Path) -> Judge:
    """A judge ready to judge, in float32. Raises CheckpointError for another kind of folder or weights that misfit."""
    content = read_config(folder, "judge")
    judge = Judge(build(JudgeConfig, content["config"], f"{folder}/config.json"))
    load_weights(judge, folder)
    return judge.eval().requires_grad_(False)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(outputs // 8, outputs), nn.ReLU()
    )


def _plain_conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Without a norm, which would take from a motion what is the same all over the picture."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.ReLU())


def _cells(pictures: Tensor) -> Tensor:
    """Pictures (b, 3, y, x) in [0, 1] as cells of 3 × 3 pixels (b, 27, y/3, x/3), centred on zero."""
    return F.pixel_unshuffle(2 * pictures - 1, _CELL).contiguous(memory_format=torch.channels_last)


def _mean(values: NDArray[np.floating] | NDArray[np.bool_]) -> float:
    return float(values.mean()) if values.size else math.nan


def _ratio(errors: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    return float(errors.sum() / sizes.sum()) if sizes.any() else math.nan


def _unit(maps: Tensor) -> Tensor:
    return F.normalize(maps, dim=1, eps=_SMALL)
