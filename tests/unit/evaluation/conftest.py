"""A tiny world with random weights whose camera branch is not zero, and clips of noise with random motion."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minwm.data.clips import KIND, Clip, frames_to_mp4
from minwm.data.shards import ShardWriter
from minwm.evaluation.evaluate import EvaluationConfig, evaluate
from minwm.evaluation.judge import Judge, JudgeConfig, load_judge, save_judge, true_motions
from minwm.evaluation.measures import Critics
from minwm.evaluation.speed import SpeedConfig
from minwm.geometry.live import CameraVelocity, Speeds, advance
from minwm.models.autoencoder import Autoencoder, AutoencoderConfig
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.checkpoints import save_autoencoder
from minwm.models.context import History
from minwm.models.presets import WorldConfig
from minwm.models.wan import Wan, WanConfig
from minwm.models.worlds import World, WorldCard, save_world

MakeClip = Callable[..., Clip]
HEIGHT, WIDTH = 32, 48


def _new_backbone() -> Backbone:
    torch.manual_seed(0)
    config = WorldConfig(
        preset="tiny",
        architecture=WanConfig(
            dim=32,
            layers=2,
            heads=2,
            ffn_dim=64,
            text_dim=8,
            text_length=64,
            byte_text=True,
            conditions=("camera_prope",),
        ),
        history=History(chunk=2, window=4),
        shift=3.0,
        levels={1: (1.0,), 2: (1.0, 0.75)},
    )
    model = Wan(config.architecture)
    for block in model.blocks:
        torch.nn.init.normal_(block.self_attn.prope_o.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return Backbone(model.eval().requires_grad_(False), config)


@pytest.fixture
def backbone() -> Backbone:
    """One that a test may change."""
    return _new_backbone()


@pytest.fixture(scope="session")
def world() -> World:
    torch.manual_seed(1)
    autoencoder = Autoencoder(AutoencoderConfig(widths=(8, 8, 16))).eval().requires_grad_(False)
    card = WorldCard(
        name="tiny",
        height=HEIGHT,
        width=WIDTH,
        fps=17.5,
        intrinsics=(0.5, 0.75, 0.5, 0.5),
        speeds=Speeds(move=4.0, turn=70.0),
        steps=2,
    )
    return World(card, _new_backbone(), autoencoder, {})


@pytest.fixture(scope="session")
def make_clip() -> MakeClip:
    def make(number: int, *, latent_frames: int = 12, motion: int | None = None, split: str = "heldout") -> Clip:
        """Clip `number`; equal `motion` (its number unless given) is an equal camera path."""
        random = np.random.default_rng(number)
        path = np.random.default_rng(number if motion is None else motion)
        velocity = CameraVelocity(forward=path.normal(), right=path.normal(), yaw=30 * path.normal())
        poses = [np.eye(4)]
        for _ in range(latent_frames - 1):
            poses.append(advance(poses[-1], velocity, 0.25))
        frames = random.integers(0, 256, (4 * latent_frames, HEIGHT, WIDTH, 3), np.uint8)
        return Clip(
            name=f"clip-{number:03d}",
            episode="episode",
            split=split,  # type: ignore[arg-type]
            caption=f"maze e1m{1 + number % 2}: hall",
            latents=random.normal(size=(latent_frames, 16, HEIGHT // 8, WIDTH // 8)).astype(np.float16),
            poses=np.stack(poses),
            intrinsics=np.array([0.5, 0.75, 0.5, 0.5], np.float32),
            actions=np.zeros(latent_frames, np.int64),
            frames=frames_to_mp4(frames, 17.5),
            notes={},
        )

    return make


@pytest.fixture
def world_folder(world: World, tmp_path: Path) -> Path:
    save_backbone(tmp_path / "backbone", world.backbone, {})
    save_autoencoder(tmp_path / "autoencoder", world.autoencoder)
    save_world(tmp_path / "world", world.card, tmp_path / "backbone", tmp_path / "autoencoder", {})
    return tmp_path / "world"


@pytest.fixture(scope="session")
def dataset(make_clip: MakeClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("dataset")
    with ShardWriter(tmp_path / "data", KIND) as writer:
        for number in range(4):
            clip = make_clip(number, split="train" if number == 0 else "heldout")
            writer.add(clip.name, clip.to_files())
        writer.about = {"size": [HEIGHT, WIDTH], "fps": 17.5, "speeds": {"move": 4.0, "turn": 70.0}}
    return tmp_path / "data"


def painted(numbers: Iterable[int]) -> NDArray[np.uint8]:
    """Four frames for each latent frame, whose brightness is the latent frame's number."""
    return np.stack([np.full((HEIGHT, WIDTH, 3), number, np.uint8) for number in numbers for _ in range(4)])


class Odometer:
    """Sees the true motion of painted frames: it knows the path, and reads off a frame where on it that is."""

    def __init__(self, poses: NDArray[np.float64]) -> None:
        self._poses = poses

    def motions(self, frames: NDArray[np.uint8]) -> NDArray[np.float64]:
        """As MotionEstimator."""
        return true_motions(self._poses[frames[3::4, 0, 0, 0]])


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge with random weights: what it says means nothing, but it says it."""
    tmp_path = tmp_path_factory.mktemp("judges")
    config = JudgeConfig(labels=("lamp",), scenes=("hall",), widths=(8, 8, 8), trunk=8, features=6)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        save_judge(tmp_path / "judge", Judge(config))
    return tmp_path / "judge"


@pytest.fixture(scope="session")
def critics(judge_folder: Path) -> Critics:
    judge = load_judge(judge_folder)
    return Critics(motion=judge, features=judge)


@dataclass(frozen=True)
class Evaluated:
    """What a full evaluation of `world` found, and the folder that it wrote."""

    result: dict[str, Any]
    folder: Path


@pytest.fixture(scope="session")
def full(world: World, dataset: Path, critics: Critics, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Three clips, a walk of two seconds, and the world's own backbone for a teacher."""
    config = EvaluationConfig(
        seconds=1.8,
        long_clips=1,
        long_seconds=2.0,
        speed=SpeedConfig(rounds=1, bidirectional_steps=2, bidirectional_frames=4, teacher_steps=2),
        teacher_clips=2,
        teacher_steps=2,
    )
    folder = tmp_path_factory.mktemp("full") / "the world"
    return Evaluated(evaluate(world, dataset, folder, config, critics=critics, teacher=world.backbone), folder)
