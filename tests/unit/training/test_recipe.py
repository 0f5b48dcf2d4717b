"""Recipes: from YAML to a trained model folder, and what is wrong in one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from minwm.data.clips import KIND, Clip
from minwm.data.shards import ShardWriter, read_manifest
from minwm.errors import CheckpointError, ConfigError, DataError, InputError, TrainingError
from minwm.models.backbones import Backbone, load_backbone, save_backbone
from minwm.models.context import History
from minwm.training.recipe import load_recipe, run_recipe

pytestmark = pytest.mark.unit


@pytest.fixture
def values(tmp_path: Path, tiny_backbone: Backbone, new_clips: Callable[[int, int], list[Clip]]) -> dict[str, Any]:
    """A recipe of two steps on a tiny dataset and backbone."""
    with ShardWriter(tmp_path / "data", KIND) as writer:
        for clip in new_clips(2, 5):
            writer.add(clip.name, clip.to_files())
    save_backbone(tmp_path / "base", tiny_backbone, {})
    return {
        "stage": "autoregressive",
        "data": str(tmp_path / "data"),
        "backbone": str(tmp_path / "base"),
        "run": {"steps": 2, "batch_size": 2, "engine": "torch"},
        "optimizers": {"generator": {"learning_rate": "1e-3"}},
        "method": {"window": {"frames": 4}},
    }


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("stage", ["bidirectional", "autoregressive", "consistency", "dmd"])
def test_every_stage_trains_from_a_recipe_and_says_where_its_model_came_from(
    tmp_path: Path, values: dict[str, Any], stage: str
) -> None:
    values["stage"] = stage
    if stage == "dmd":
        values["method"] |= {"score": values["backbone"], "steps": [1, 2, 4]}
        values["optimizers"]["critic"] = {}
    model = run_recipe(load_recipe(write(tmp_path, values)), tmp_path / "run")
    assert model == tmp_path / "run/model"
    trained, base = load_backbone(model), load_backbone(tmp_path / "base")
    assert trained.config == base.config
    assert json.loads((model / "config.json").read_text())["about"] == {
        "stage": stage,
        "data": values["data"],
        "from": values["backbone"],
        "dataset": read_manifest(tmp_path / "data", KIND).digest(),
        "steps": 2,
        "batch_size": 2,
        "engine": "torch",
    }


def test_a_recipe_chooses_what_steers_the_model(tmp_path: Path, values: dict[str, Any]) -> None:
    values["conditions"] = ["action_timestep", "camera_prope"]
    model = run_recipe(load_recipe(write(tmp_path, values)), tmp_path / "run")
    trained = load_backbone(model)
    assert trained.config.architecture.conditions == ("action_timestep", "camera_prope")
    assert trained.model.state_dict()["conditions.action_timestep.mlp.2.weight"].any(), "the new branch was trained"


def test_a_run_tells_its_speed_and_its_loss_on_heldout_clips(
    tmp_path: Path, values: dict[str, Any], new_clips: Callable[[int, int], list[Clip]]
) -> None:
    with ShardWriter(tmp_path / "split", KIND) as writer:
        for clip, split in zip(new_clips(3, 5), ("train", "heldout", "train"), strict=True):
            writer.add(clip.name, replace(clip, split=split).to_files())
    values |= {"data": str(tmp_path / "split"), "run": {**values["run"], "validate_every": 2, "loaders": 1}}
    run_recipe(load_recipe(write(tmp_path, values)), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert ["generator_heldout_loss" in line for line in lines] == [False, True]
    for line in lines:
        tokens = line["tokens_per_second"] * line["step_seconds"]
        assert tokens == pytest.approx(2 * 4 * 6), "two samples of four latent frames of 2 × 3 patches"
        assert line["flops_utilisation"] > 0


def test_a_run_goes_on_only_with_the_same_recipe_and_data(
    tmp_path: Path, values: dict[str, Any], new_clips: Callable[[int, int], list[Clip]]
) -> None:
    run_recipe(load_recipe(write(tmp_path, values)), tmp_path / "run")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    longer = ["run.steps=3", f"data={tmp_path / 'moved'}"]
    run_recipe(load_recipe(write(tmp_path, values), longer), tmp_path / "run")
    with pytest.raises(TrainingError, match=r"method.window.prompt_dropout=None where this run has 0.5"):
        run_recipe(
            load_recipe(write(tmp_path, values), [*longer, "method.window.prompt_dropout=0.5"]), tmp_path / "run"
        )
    with ShardWriter(tmp_path / "other", KIND) as writer:
        writer.add("clip-9", new_clips(1, 5)[0].to_files())
    with pytest.raises(TrainingError, match=r"was made with dataset='\w+' where this run has"):
        run_recipe(
            load_recipe(write(tmp_path, values), ["run.steps=3", f"data={tmp_path / 'other'}"]), tmp_path / "run"
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_compiled_blocks_train_as_plain_ones_do(tmp_path: Path, values: dict[str, Any]) -> None:
    losses = []
    for compiled in (False, True):
        values["run"] |= {"compile": compiled, "bf16": False}
        run_recipe(load_recipe(write(tmp_path, values)), tmp_path / str(compiled))
        lines = (tmp_path / str(compiled) / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["generator_loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("stage", ["autoregressive", "consistency", "dmd"])
def test_a_recipe_chooses_a_student_frame_by_frame(tmp_path: Path, values: dict[str, Any], stage: str) -> None:
    values |= {"stage": stage, "history": {"chunk": 1, "window": 3, "sink": 1}}
    values["method"]["window"] = {"frames": 3}  # no whole number of the backbone's own chunks
    if stage == "dmd":
        values["method"] |= {"score": values["backbone"], "rollout_frames": 5}
        values["optimizers"]["critic"] = {}
    trained = load_backbone(run_recipe(load_recipe(write(tmp_path, values)), tmp_path / "run"))
    assert trained.config.history == History(chunk=1, window=3, sink=1)


@pytest.mark.parametrize(
    ("override", "error", "complaint"),
    [
        ("stage=magic", ConfigError, "stage: 'magic' is unknown, expected one of autoencoder, autoregressive"),
        ("backbone=", ConfigError, "backbone"),
        ("backbone=preset:wan-boom", ConfigError, "preset 'wan-boom': unknown, expected one of wan-doom"),
        ("conditions=[camera_prop]", ConfigError, r"conditions\[0\]: 'camera_prop' is not what was expected: one of"),
        ("encoders={folder: nowhere}", ConfigError, "encoders.cache: is required and missing"),
        ("backbone=nowhere", CheckpointError, "nowhere: not a model folder"),
        ("data=nowhere", DataError, "nowhere: not a dataset"),
        ("method.window.frame=4", ConfigError, "method.window.frame: unknown key, did you mean 'frames'?"),
        ("method.window.frames=98", DataError, "has 5 latent frames, windows need 98"),
        ("method.window.frames=3", InputError, "frames=3: expected a multiple of the chunk, 2 latent frames"),
        ("method.window.frames=0", ConfigError, "window: frames=0, .*: expected at least one frame"),
        ("method.window.prompt_dropout=7", ConfigError, "prompt_dropout=7.0, .* shares of 0 to 1"),
        ("run.validate_every=1", DataError, "has no clips in split 'heldout', 2 in all"),
        ("history={chunk: 2, window: 1}", ConfigError, "history: chunk=2, window=1, sink=0: expected 1 <= chunk"),
        ("history.chnk=2", ConfigError, "history.chnk: unknown key, did you mean 'chunk'?"),
        ("method.levels.density=odd", ConfigError, "method.levels.density: 'odd' is not what was expected: one of"),
        ("method.window.pose_noise.translation=-1", ConfigError, r"pose_noise: -1\.0"),
        ("run.stepz=4", ConfigError, "run.stepz: unknown key, did you mean 'steps'?"),
        ("optimizers.critic.learning_rate=1", ConfigError, r"optimizers: expected exactly \['generator'\]"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(
    tmp_path: Path, values: dict[str, Any], override: str, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        run_recipe(load_recipe(write(tmp_path, values), [override]), tmp_path / "run")
    assert not (tmp_path / "run/model").exists()
