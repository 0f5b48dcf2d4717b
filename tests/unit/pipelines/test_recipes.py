"""Recipes: what is wrong in one is said before anything runs."""

import shutil
from pathlib import Path

import pytest

from minwm.errors import ConfigError
from minwm_pipelines.recipes import STAGES, data_recipe, load_recipes, stage_recipe

pytestmark = pytest.mark.unit

DEMO = Path(__file__).parents[3] / "recipes/doom/demo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo's recipes."""
    return Path(shutil.copytree(DEMO, tmp_path / "recipes"))


def test_recipes_travel_in_one_line_and_keep_their_meaning() -> None:
    texts = load_recipes(DEMO)
    assert all("\n" not in text for text in texts.values())
    assert data_recipe(texts["data"]).game.frames_per_episode == 512
    for stage in STAGES:
        score = Path("score") if stage == "dmd" else None
        recipe = stage_recipe(texts[stage], Path("data"), Path("weights"), score)
        assert (recipe.stage, recipe.data, recipe.backbone) == (stage, Path("data"), "weights")
        assert recipe.method.get("score") == score
        assert isinstance(recipe.run.steps, int) and recipe.run.steps > 0


@pytest.mark.parametrize("name", ["data", *STAGES])
def test_a_missing_recipe_is_named(folder: Path, name: str) -> None:
    (folder / f"{name}.yaml").unlink()
    with pytest.raises(ConfigError, match=rf"{name}\.yaml: no such recipe"):
        load_recipes(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("dmd", "steps:", "stepps:", r"dmd\.yaml: run\.stepps: unknown key, did you mean 'steps'"),
        ("data", "episodes: 6", "episodes: 0", r"data\.yaml: episodes=0"),
        ("data", "seed: 7", "seed: seven", r"data\.yaml: game\.seed: 'seven'"),
        ("consistency", "stage: consistency", "stage: dmd", r"consistency\.yaml: stage: 'dmd', expected 'consistency'"),
        ("dmd", "stage: dmd", "stage: dmd\nbackbone: weights", r"dmd\.yaml: backbone: is set by the pipeline"),
    ],
)
def test_a_mistake_is_named_with_its_file(folder: Path, name: str, old: str, new: str, message: str) -> None:
    path = folder / f"{name}.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_recipes(folder)
