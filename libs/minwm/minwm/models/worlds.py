"""A world model that can be served: backbone, autoencoder, and what a player needs to know of it.

On disk: `world.json`, `backbone/`, `autoencoder/`, and `starts/NAME.png`, pictures to start from.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from minwm.config import build
from minwm.errors import CheckpointError
from minwm.geometry.live import Speeds
from minwm.models.autoencoder import Autoencoder
from minwm.models.backbones import Backbone, load_backbone
from minwm.models.checkpoints import load_autoencoder, read_json
from minwm.precision import native_dtype

WORLD = "world.json"


@dataclass(frozen=True, kw_only=True)
class WorldCard:
    """`world.json`. Sizes in pixels, intrinsics normalised, speeds of live control."""

    name: str
    height: int
    width: int
    fps: float
    intrinsics: tuple[float, float, float, float]
    speeds: Speeds
    steps: int = 4


@dataclass(frozen=True)
class World:
    """A loaded world model."""

    card: WorldCard
    backbone: Backbone
    autoencoder: Autoencoder
    starts: Mapping[str, NDArray[np.uint8]]


def save_world(
    folder: Path, card: WorldCard, backbone: Path, autoencoder: Path, starts: Mapping[str, NDArray[np.uint8]]
) -> None:
    """Assemble a world folder from model folders; written aside, then renamed, replacing an old one."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "starts").mkdir(parents=True)
    shutil.copytree(backbone, partial / "backbone")
    shutil.copytree(autoencoder, partial / "autoencoder")
    for name, picture in starts.items():
        Image.fromarray(picture).save(partial / "starts" / f"{name}.png")
    (partial / WORLD).write_text(json.dumps(asdict(card), indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def load_world(folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> World:
    """A world ready to generate on a device, in the device's own precision unless another is given.

    Raises CheckpointError or ConfigError for whatever does not fit.
    """
    path = folder / WORLD
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a world model (it has no {WORLD})")
    card = build(WorldCard, read_json(path), str(path))
    dtype = dtype or native_dtype(device)
    backbone = load_backbone(folder / "backbone", dtype)
    backbone.model.eval().requires_grad_(False).to(device)
    autoencoder = load_autoencoder(folder / "autoencoder", dtype).requires_grad_(False).to(device)
    starts = {p.stem: np.asarray(Image.open(p).convert("RGB")) for p in sorted((folder / "starts").glob("*.png"))}
    return World(card, backbone, autoencoder, starts)
