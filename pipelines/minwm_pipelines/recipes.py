"""What a pipeline is told: a folder with `data.yaml` and one recipe per training stage.

Recipes travel to the components as one line of JSON, which YAML readers read: structured parameters would
turn every number into a float, and Kubeflow's compiler breaks on defaults of several lines. A stage's recipe
is that of `minwm train` without `data` and `backbone`: the pipeline connects them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minwm.config import build, load_yaml
from minwm.data.build import ClipsConfig
from minwm.data.doom import DoomConfig
from minwm.errors import ConfigError
from minwm.training.recipe import Recipe

STAGES = ("bidirectional", "autoregressive", "consistency", "dmd")
DATA = "data"
_CONNECTED = ("data", "backbone")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """`data.yaml`: what to play, and how to cut it."""

    game: DoomConfig = field(default_factory=DoomConfig)
    clips: ClipsConfig = field(default_factory=ClipsConfig)


def load_recipes(folder: Path) -> dict[str, str]:
    """Every recipe as text, by stage. Raises ConfigError, naming the file, for whatever is wrong in one."""
    texts = {}
    for name in (DATA, *STAGES):
        path = folder / f"{name}.yaml"
        texts[name] = json.dumps(load_yaml(path))
        try:
            _check(name, texts[name])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return texts


def data_recipe(text: str) -> DataRecipe:
    """Read the recipe of the data."""
    return build(DataRecipe, _mapping(text))


def stage_recipe(text: str, data: Path, backbone: Path, score: Path | None = None) -> Recipe:
    """A stage's recipe, connected to its dataset, its starting weights and, for DMD, the score's weights."""
    content = _mapping(text)
    for key in _CONNECTED:
        if key in content:
            raise ConfigError(f"{key}: is set by the pipeline, expected a recipe without it")
    if score is not None:
        content["method"] = {**content.get("method", {}), "score": score}
    return build(Recipe, {**content, "data": data, "backbone": str(backbone)})


def _check(name: str, text: str) -> None:
    if name == DATA:
        data_recipe(text)
        return
    anywhere = Path("anywhere")
    recipe = stage_recipe(text, anywhere, anywhere, anywhere if name == "dmd" else None)
    if recipe.stage != name:
        raise ConfigError(f"stage: {recipe.stage!r}, expected {name!r} as the file's name says")


def _mapping(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ConfigError(f"recipe: {text!r} is no mapping")
    return content
