"""Training learned control: what cannot be faked. New walks through the game, the shipped weights, real training."""

from pathlib import Path

import pytest
import torch

from minwm.data.build import ClipsConfig, build_clips
from minwm.data.clips import load_clips
from minwm.data.doom import DoomConfig, record
from minwm.evaluation.control import control_margin
from minwm.models.backbones import load_backbone
from minwm.models.checkpoints import load_autoencoder
from minwm.precision import native_dtype
from minwm.training.engine import OptimizerConfig
from minwm.training.loop import RunConfig
from minwm.training.recipe import Recipe, run_recipe

pytestmark = pytest.mark.e2e

MODELS = Path(__file__).parents[2] / "models" / "wan-doom"
GAME = DoomConfig(scenes=("freedoom1:E1M3",), episodes=4, frames_per_episode=384, seed=4711)


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


def test_the_fine_tuned_model_predicts_heldout_play_better_with_its_own_camera_path(
    tmp_path: Path, two_threads: None
) -> None:
    data = tmp_path / "clips"
    autoencoder = load_autoencoder(MODELS / "autoencoder", native_dtype())
    build_clips(record(GAME), autoencoder, data, ClipsConfig(clip_frames=16, heldout_every=2))
    recipe = Recipe(
        stage="autoregressive",
        data=data,
        backbone=str(MODELS / "base"),
        run=RunConfig(steps=6, batch_size=4, engine="torch"),
        optimizers={"generator": OptimizerConfig(learning_rate=1e-4)},
    )
    tuned = load_backbone(run_recipe(recipe, tmp_path / "run"))
    heldout, _ = load_clips(data, "heldout")
    margin = control_margin(tuned, heldout, levels=4)
    assert margin.learned, margin.verdict()
