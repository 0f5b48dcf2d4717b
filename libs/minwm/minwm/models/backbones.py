"""A backbone: the transformer together with how it is run, and its folder on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minwm.config import build
from minwm.models.checkpoints import CONFIG, load_weights, read_config, save_model
from minwm.models.presets import WorldConfig, preset
from minwm.models.wan import Wan

KIND = "backbone"


@dataclass(frozen=True)
class Backbone:
    """Weights and configuration."""

    model: Wan
    config: WorldConfig

    @property
    def text_length(self) -> int:
        """Bytes or embeddings that a prompt is padded to."""
        return self.config.architecture.text_length


def new_backbone(name: str, seed: int) -> Backbone:
    """A preset with random weights, a function of the seed."""
    config = preset(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Backbone(Wan(config.architecture), config)


def load_backbone(folder: Path, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone from its folder. Raises CheckpointError or ConfigError for whatever does not fit."""
    values = read_config(folder, KIND)["config"]
    if "levels" in values:  # JSON's keys are strings
        values["levels"] = {int(steps): tuple(levels) for steps, levels in values["levels"].items()}
    config = build(WorldConfig, values, f"{folder}/{CONFIG}")
    model = Wan(config.architecture)
    load_weights(model, folder)
    return Backbone(model.to(dtype), config)


def save_backbone(folder: Path, backbone: Backbone, about: Mapping[str, Any]) -> None:
    """Write a backbone's folder; `about` is its provenance."""
    save_model(folder, backbone.model, kind=KIND, config=backbone.config, about=about)
