"""A tiny world with random weights, served by the real service on Ray Serve."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minwm.geometry.live import Speeds
from minwm.models.autoencoder import Autoencoder, AutoencoderConfig
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.checkpoints import save_autoencoder
from minwm.models.presets import preset
from minwm.models.wan import Wan
from minwm.models.worlds import WorldCard, save_world
from minwm_session.deployment import ServiceConfig, free_port, running_service

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    config = preset("wan-doom")
    config = replace(config, architecture=replace(config.architecture, dim=64, layers=2, heads=1, ffn_dim=128))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Wan(config.architecture)
        for parameter in model.parameters():  # layers that start as zero would hide the controls
            parameter.add_(0.1 * torch.randn_like(parameter))
        save_backbone(folder / "backbone", Backbone(model, config), {})
        save_autoencoder(folder / "autoencoder", Autoencoder(AutoencoderConfig(widths=(8, 16, 32))))
    card = WorldCard(
        name="tiny",
        height=HEIGHT,
        width=WIDTH,
        fps=17.5,
        intrinsics=(0.5, 0.75, 0.5, 0.5),
        speeds=Speeds(move=4.0, turn=70.0),
    )
    hall = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    save_world(folder / "world", card, folder / "backbone", folder / "autoencoder", {"hall": hall})
    return folder / "world"


@pytest.fixture(scope="module")
def config(world: Path) -> ServiceConfig:
    return ServiceConfig(model=world, port=free_port(), slots=2, metrics_port=free_port(), idle_seconds=3, threads=1)


@pytest.fixture(scope="module")
def address(config: ServiceConfig) -> Iterator[str]:
    with running_service(config) as address:
        yield address
