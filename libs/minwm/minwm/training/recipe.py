"""Recipes: YAML that says which stage to train, on what, from which weights, and for how long.

stage: autoregressive
data: runs/demo/data          # a dataset folder
backbone: models/wan-doom/base   # a model folder, or `preset:NAME` for random weights
history: {chunk: 1, window: 16}   # frame by frame; chunk, window and sink are the model's own if not given
conditions: [camera_prope, action_timestep]   # what steers it; as the model has them if not given
encoders: {folder: published/wan, cache: runs/embeddings}   # of prompts, for backbones that take embeddings
run: {steps: 30, batch_size: 4}
optimizers: {generator: {learning_rate: 1e-4}}
method: {window: {frames: 8}}    # the stage's own configuration
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minwm.config import build, load_yaml
from minwm.data.clips import load_clips
from minwm.data.episode import load_episodes
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, load_backbone, new_backbone, with_conditions
from minwm.models.conditions import ConditionName
from minwm.models.context import History
from minwm.models.prompts import EncodersConfig, prompt_encoder
from minwm.training.autoencoder import AutoencoderStage, AutoencoderStageConfig
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.decoder import DecoderStage, DecoderStageConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.engine import OptimizerConfig
from minwm.training.loop import Progress, RunConfig, train
from minwm.training.ode import Ode, OdeConfig
from minwm.training.stage import Stage
from minwm.training.trajectories import SamplingConfig, load_trajectories, write_trajectories

PRESET = "preset:"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    stage: str
    data: Path
    run: RunConfig
    optimizers: dict[str, OptimizerConfig]
    backbone: str = ""
    conditions: tuple[ConditionName, ...] | None = None
    history: History | None = None
    encoders: EncodersConfig | None = None
    method: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in _STAGES:
            raise ConfigError(f"stage: {self.stage!r} is unknown, expected one of {', '.join(sorted(_STAGES))}")
        if self.stage not in _WITHOUT_BACKBONE and not self.backbone:
            raise ConfigError(f"backbone: is required by stage {self.stage!r}: a model folder or preset:NAME")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `key.path=value` overrides applied. Raises ConfigError for whatever is wrong in it."""
    return build(Recipe, load_yaml(path, overrides))


def run_recipe(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Path:
    """Train; the exported model's folder."""
    about = {"stage": recipe.stage, "data": str(recipe.data), "from": recipe.backbone}
    stage, samples, digest = _STAGES[recipe.stage](recipe)
    train(stage, samples, recipe.run, recipe.optimizers, folder, {**about, "dataset": digest}, progress)
    return folder / "model"


@dataclass(frozen=True, kw_only=True)
class TrajectoriesRecipe:
    """What `minwm trajectories` samples for the stage `ode`: from an autoregressive model, on a dataset of clips."""

    data: Path
    backbone: str
    sampling: SamplingConfig
    conditions: tuple[ConditionName, ...] | None = None
    history: History | None = None
    encoders: EncodersConfig | None = None


def load_trajectories_recipe(path: Path, overrides: Sequence[str] = ()) -> TrajectoriesRecipe:
    """Read a recipe of trajectories. Raises ConfigError for whatever is wrong in it."""
    return build(TrajectoriesRecipe, load_yaml(path, overrides))


def run_trajectories(recipe: TrajectoriesRecipe, folder: Path, progress: Callable[[int], None] | None = None) -> None:
    """Sample trajectories to a new folder. Raises DataError for one that holds a dataset."""
    clips, manifest = load_clips(recipe.data, "train")
    about = {"from": recipe.backbone, "data": str(recipe.data), "dataset": manifest.digest()}
    write_trajectories(_backbone(recipe, recipe.sampling.seed), clips, recipe.sampling, folder, about, progress)


def _backbone(recipe: Recipe | TrajectoriesRecipe, seed: int) -> Backbone:
    if recipe.backbone.startswith(PRESET):
        backbone = new_backbone(recipe.backbone.removeprefix(PRESET), seed)
    else:
        backbone = load_backbone(Path(recipe.backbone))
    if recipe.conditions is not None:
        backbone = with_conditions(backbone, recipe.conditions, seed)
    if recipe.history is not None:
        backbone = replace(backbone, config=replace(backbone.config, history=recipe.history))
    if recipe.encoders is not None:
        backbone = replace(backbone, encoder=prompt_encoder(recipe.encoders, backbone.config.architecture))
    return backbone


_Prepared = tuple[Stage, Sequence[Any], str]


def _autoencoder(recipe: Recipe) -> _Prepared:
    config = build(AutoencoderStageConfig, recipe.method, "method")
    episodes, manifest = load_episodes(recipe.data)
    return AutoencoderStage(config, recipe.run.seed), episodes, manifest.digest()


def _on_clips(make: Callable[[Recipe], Stage]) -> Callable[[Recipe], _Prepared]:
    def prepare(recipe: Recipe) -> _Prepared:
        stage = make(recipe)
        clips, manifest = load_clips(recipe.data, "train")
        return stage, clips, manifest.digest()

    return prepare


def _dmd(recipe: Recipe) -> Stage:
    config = build(DMDConfig, recipe.method, "method")
    return DMD(config, _backbone(recipe, recipe.run.seed), load_backbone(config.score))


def _ode(recipe: Recipe) -> _Prepared:
    config = build(OdeConfig, recipe.method, "method")
    trajectories = load_trajectories(recipe.data)
    return Ode(config, _backbone(recipe, recipe.run.seed), trajectories), trajectories.samples, trajectories.digest


_WITHOUT_BACKBONE = ("autoencoder", "decoder")
_STAGES: dict[str, Callable[[Recipe], _Prepared]] = {
    "autoencoder": _autoencoder,
    "decoder": _on_clips(lambda r: DecoderStage(build(DecoderStageConfig, r.method, "method"), r.run.seed)),
    "bidirectional": _on_clips(
        lambda r: Bidirectional(build(BidirectionalConfig, r.method, "method"), _backbone(r, r.run.seed))
    ),
    "autoregressive": _on_clips(
        lambda r: Autoregressive(build(AutoregressiveConfig, r.method, "method"), _backbone(r, r.run.seed))
    ),
    "consistency": _on_clips(
        lambda r: Consistency(build(ConsistencyConfig, r.method, "method"), _backbone(r, r.run.seed))
    ),
    "ode": _ode,
    "dmd": _on_clips(_dmd),
}
