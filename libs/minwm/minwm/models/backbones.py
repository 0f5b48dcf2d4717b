"""A backbone: the transformer together with how it is run, and its folder on disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minwm.config import build
from minwm.errors import ConfigError
from minwm.models.checkpoints import CONFIG, load_tensors, load_weights, read_config, save_model
from minwm.models.conditions import BranchSizes, ConditionBranches, ConditionName
from minwm.models.hunyuan import Hunyuan, HunyuanConfig
from minwm.models.layers import dtype_of
from minwm.models.presets import WorldConfig, preset
from minwm.models.sources import InMemory
from minwm.models.text import byte_tokens
from minwm.models.transformer import Transformer
from minwm.models.wan import Wan, WanConfig

KIND = "backbone"
Encode = Callable[[Sequence[str]], Any]
"""Prompts to what the transformer's `prompt` takes."""


def new_model(architecture: WanConfig | HunyuanConfig) -> Transformer:
    """The transformer of an architecture, with random weights."""
    return Wan(architecture) if isinstance(architecture, WanConfig) else Hunyuan(architecture)


@dataclass(frozen=True)
class Backbone:
    """Weights, configuration, and the text encoder where the model does not embed bytes itself."""

    model: Transformer
    config: WorldConfig
    encoder: Encode | None = None

    def encode(self, prompts: Sequence[str]) -> Any:
        """Prompts as `model.prompt` takes them. Raises ConfigError where the text encoder is missing."""
        if self.encoder is not None:
            return self.encoder(prompts)
        architecture = self.config.architecture
        if isinstance(architecture, WanConfig) and architecture.byte_text:
            return byte_tokens(prompts, architecture.text_length)
        raise ConfigError(f"encoder: {self.config.preset} takes embeddings of prompts, expected its text encoder")


def new_backbone(name: str, seed: int) -> Backbone:
    """A preset with random weights, a function of the seed."""
    config = preset(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Backbone(new_model(config.architecture), config)


def load_config(folder: Path) -> WorldConfig:
    """The configuration in a backbone's folder. Raises CheckpointError or ConfigError for whatever is wrong in it."""
    values = read_config(folder, KIND)["config"]
    if "levels" in values:  # JSON's keys are strings
        values["levels"] = {int(steps): tuple(levels) for steps, levels in values["levels"].items()}
    return build(WorldConfig, values, f"{folder}/{CONFIG}")


def load_backbone(folder: Path, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone from its folder. Raises CheckpointError or ConfigError for whatever does not fit."""
    config = load_config(folder)
    with torch.device("meta"):  # no weights until they are read
        model = new_model(config.architecture).to(dtype)
    load_weights(model, folder)
    return Backbone(model, config)


def save_backbone(folder: Path, backbone: Backbone, about: Mapping[str, Any]) -> None:
    """Write a backbone's folder; `about` is its provenance."""
    save_model(folder, backbone.model, kind=KIND, config=backbone.config, about=about)


def with_conditions(backbone: Backbone, names: Sequence[ConditionName], seed: int) -> Backbone:
    """The same backbone steered by these conditions, and no others.

    Branches that it has keep their weights; new ones start without effect, from random weights of the seed
    behind zeros.
    """
    config = replace(backbone.config, architecture=replace(backbone.config.architecture, conditions=tuple(names)))
    old, dtype = backbone.model.state_dict(), dtype_of(backbone.model)
    with torch.device("meta"):
        model = new_model(config.architecture).to(dtype)
    wanted = model.state_dict()
    fresh = new_branches(config.architecture, [name for name in wanted if name not in old], seed, dtype)
    load_tensors(
        model, InMemory({name: old[name] if name in old else fresh[name] for name in wanted}), where=config.preset
    )
    return Backbone(model, config, backbone.encoder)


def new_branches(
    architecture: WanConfig | HunyuanConfig, names: Sequence[str], seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """First values of condition branches, by key: as their modules begin, and zeros beside self-attention (PRoPE)."""
    sizes = BranchSizes(
        dim=architecture.dim,
        heads=architecture.heads,
        layers=architecture.layers,
        channels=architecture.channels,
        patch=architecture.patch,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        branches = ConditionBranches(architecture.conditions, sizes).state_dict(prefix="conditions.")
    with torch.device("meta"):
        shapes = new_model(architecture).state_dict()
    return {name: branches.get(name, torch.zeros(shapes[name].shape)).to(dtype) for name in names}
