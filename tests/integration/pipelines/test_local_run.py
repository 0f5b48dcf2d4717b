"""The pipeline on this machine, from game play to the registry, with models small enough to train in seconds."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from minwm.artifacts.registry import ModelRegistry
from minwm.artifacts.store import DirectoryStore, folder_digest
from minwm.models.autoencoder import Autoencoder, AutoencoderConfig
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.checkpoints import save_autoencoder
from minwm.models.context import History
from minwm.models.presets import WorldConfig, preset
from minwm.models.wan import Wan, WanConfig
from minwm.models.worlds import load_world
from minwm_pipelines.local import LOG, LocalRun, PipelineError, run_locally, world_model_arguments
from minwm_pipelines.pipeline import Cluster, make_pipeline
from minwm_pipelines.recipes import STAGES, load_recipes

pytestmark = pytest.mark.integration

STEPS = 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a small autoencoder and a small backbone, both with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(widths=(8, 8, 16)))
    autoencoder.calibrate(torch.randn(16), 0.5 + torch.rand(16))
    save_autoencoder(folder / "autoencoder", autoencoder)
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
        history=History(chunk=2, window=6),
        shift=3.0,
        levels=preset("wan-doom").levels,
    )
    save_backbone(folder / "base", Backbone(Wan(config.architecture), config), {"from": "random"})
    return folder / "autoencoder", folder / "base"


def write_recipes(folder: Path) -> dict[str, str]:
    """Recipes of a few steps on two short episodes."""
    folder.mkdir()
    data = {
        "game": {"episodes": 2, "frames_per_episode": 128, "height": 32, "width": 48},
        "clips": {"clip_frames": 8, "heldout_every": 2},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    for stage in STAGES:
        networks = ("generator", "critic") if stage == "dmd" else ("generator",)
        recipe = {
            "stage": stage,
            "run": {"steps": STEPS, "batch_size": 2},
            "optimizers": {network: {"learning_rate": 1e-3} for network in networks},
            "method": {"window": {"frames": 4}},
        }
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    return load_recipes(folder)


def run(folder: Path, weights: tuple[Path, Path], recipes: dict[str, str]) -> LocalRun:
    autoencoder, base = weights
    arguments = world_model_arguments(name="tiny", store=folder / "store", autoencoder=autoencoder, base=base, clips=2)
    return run_locally(make_pipeline(recipes, Cluster()), arguments, folder / "pipeline")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, weights: tuple[Path, Path]) -> tuple[Path, LocalRun]:
    """A run's folder and result."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder, weights, write_recipes(folder / "recipes"))


def registry(folder: Path) -> ModelRegistry:
    return ModelRegistry(DirectoryStore(folder / "store"))


def test_the_registered_model_is_the_world_that_the_pipeline_made(finished: tuple[Path, LocalRun]) -> None:
    folder, result = finished
    version = registry(folder).get("tiny")
    assert version.version == result.outputs["version"] == 1
    assert version.digest == folder_digest(Path(result.outputs["world"].path))
    world = load_world(registry(folder).fetch("tiny@latest", folder / "fetched"))
    assert (world.card.name, world.card.height, world.card.width) == ("tiny", 32, 48)
    assert world.starts and all(picture.shape == (32, 48, 3) for picture in world.starts.values())


def test_lineage_names_the_dataset_the_starting_weights_and_every_stage(
    finished: tuple[Path, LocalRun], weights: tuple[Path, Path]
) -> None:
    folder, _ = finished
    lineage = registry(folder).get("tiny").lineage
    autoencoder, base = weights
    assert lineage.parents == (folder_digest(base), folder_digest(autoencoder))
    assert [(stage.recipe, stage.steps) for stage in lineage.stages] == [(stage, STEPS) for stage in STAGES]
    kept = DirectoryStore(folder / "store").list(f"datasets/tiny/{lineage.dataset}")
    assert f"datasets/tiny/{lineage.dataset}/manifest.json" in kept


def test_metrics_of_the_evaluation_are_registered(finished: tuple[Path, LocalRun]) -> None:
    folder, result = finished
    metrics = registry(folder).get("tiny").metrics
    assert metrics and metrics == result.outputs["metrics"].metadata


def test_every_stage_leaves_its_log_and_its_models_card(finished: tuple[Path, LocalRun]) -> None:
    _, result = finished
    for stage in STAGES:
        record = Path(result.outputs[f"{stage}_record"].path)
        lines = (record / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(STEPS)), stage
        assert json.loads((record / "model/config.json").read_text())["about"]["stage"] == stage


def test_seconds_are_told_for_every_step(finished: tuple[Path, LocalRun]) -> None:
    _, result = finished
    expected = ["Playing and encoding", *(f"Training {stage}" for stage in STAGES)]
    assert list(result.seconds)[: len(expected)] == expected
    assert list(result.seconds)[-1] == "Registering"
    assert all(seconds > 0 for seconds in result.seconds.values())


def test_a_failing_step_is_named_with_its_error_and_registers_nothing(
    tmp_path: Path, weights: tuple[Path, Path]
) -> None:
    recipes = write_recipes(tmp_path / "recipes")
    window = {**json.loads(recipes["bidirectional"]), "method": {"window": {"frames": 9}}}
    with pytest.raises(PipelineError) as caught:
        run(tmp_path, weights, {**recipes, "bidirectional": json.dumps(window)})
    message = str(caught.value)
    assert "train-stage failed: DataError: clip " in message
    assert "has 8 latent frames, windows need 9" in message
    assert str(tmp_path / "pipeline" / LOG) in message
    assert registry(tmp_path).list() == ()
