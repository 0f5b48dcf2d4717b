"""A tiny world with random weights whose camera branch is not zero, and clips of noise with random motion."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from minwm.data.clips import KIND, Clip, frames_to_mp4
from minwm.data.shards import ShardWriter
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


@pytest.fixture
def backbone() -> Backbone:
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
def world(backbone: Backbone) -> World:
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
    return World(card, backbone, autoencoder, {})


@pytest.fixture
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
            caption=f"hall {number}",
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


@pytest.fixture
def dataset(make_clip: MakeClip, tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "data", KIND) as writer:
        for number in range(4):
            clip = make_clip(number, split="train" if number == 0 else "heldout")
            writer.add(clip.name, clip.to_files())
    return tmp_path / "data"
