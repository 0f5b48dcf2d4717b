"""Every recipe of a published backbone loads, and every configuration in it is built."""

from dataclasses import replace
from pathlib import Path

import pytest

from minwm.training.dry_run import plan
from minwm.training.recipe import load_recipe, load_trajectories_recipe

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3] / "recipes"
# What the recipes' model folders hold, which are made by converting published weights.
PRESETS = {
    "wan2.1-1.3b": "minwm-wan2.1-1.3b",
    "hunyuanvideo-1.5-8b": "minwm-hunyuanvideo-1.5-8b",
    "worldplay-adapt": "hy-worldplay-8b",
}
PATHS = [path for folder in PRESETS for path in sorted((ROOT / folder).glob("*.yaml"))]
STAGES = [path for path in PATHS if path.stem != "trajectories"]


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", STAGES, ids=_name)
def test_a_stage_s_recipe_builds_what_it_configures(path: Path) -> None:
    """The plan builds the method's configuration, and checks the window against the history."""
    recipe = load_recipe(path)
    assert recipe.stage == path.stem
    found = plan(replace(recipe, backbone=f"preset:{PRESETS[path.parent.name]}"))
    assert (found.window, found.tokens, found.world.history.chunk) == (20, 1560, 4)
    assert {network.name for network in found.networks if network.trained} == recipe.optimizers.keys()


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem == "trajectories"], ids=_name)
def test_trajectories_are_sampled_from_the_autoregressive_stage_s_model(path: Path) -> None:
    recipe = load_trajectories_recipe(path)
    assert recipe.backbone.endswith("/autoregressive/model")
    assert (recipe.sampling.window.frames, recipe.sampling.ode_steps, recipe.sampling.steps) == (20, 48, (4,))
    assert load_recipe(path.with_stem("ode")).data.name == "trajectories"


def test_each_published_line_has_every_stage() -> None:
    stages = {"bidirectional", "autoregressive", "trajectories", "ode", "consistency", "dmd"}
    for line in ("wan2.1-1.3b", "hunyuanvideo-1.5-8b"):
        assert {path.stem for path in PATHS if path.parent.name == line} == stages


DOOM = sorted(path for path in (ROOT / "doom").rglob("*.yaml") if "demo" not in path.parts)
QUESTIONS = {path for path in DOOM if path.parent.name == "ablations" and "arms:" in path.read_text()}


@pytest.mark.parametrize("path", [path for path in DOOM if path not in QUESTIONS], ids=_name)
def test_recipes_of_the_small_line_load_and_take_up_where_another_ends(path: Path) -> None:
    if path.stem == "trajectories":
        backbone = load_trajectories_recipe(path).backbone
    else:
        recipe = load_recipe(path)
        backbone = recipe.backbone
        assert path.stem in (recipe.stage, "start", "control", "autoregressive_long")
    if backbone.startswith("runs/doom/"):
        assert (ROOT / "doom" / f"{Path(backbone).parent.name}.yaml").is_file(), f"nothing makes {backbone}"
