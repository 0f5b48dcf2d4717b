"""What a dry run says, against real steps: FLOPs counted, activations weighed, shapes of real datasets."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from minwm.cli import application
from minwm.config import build
from minwm.data.clips import KIND as CLIPS
from minwm.data.clips import Clip
from minwm.data.shards import ShardWriter
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, save_backbone
from minwm.models.context import History
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.dry_run import plan
from minwm.training.recipe import Recipe
from minwm.training.stage import Stage

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
NewClips = Callable[[int, int], list[Clip]]

METHODS: dict[str, dict[str, Any]] = {
    "bidirectional": {"window": {"frames": 8}},
    "autoregressive": {"window": {"frames": 8}},
    "consistency": {"window": {"frames": 8}, "guidance": 3.0},
    # one step: nothing of the rollout is left to chance
    "dmd": {"window": {"frames": 8}, "steps": [1], "critic_ratio": 1, "guidance": 3.0},
}
RUN = {"steps": 1, "batch_size": 2}


@pytest.fixture
def backbone(new_backbone: NewBackbone) -> Backbone:
    return new_backbone(History(chunk=2, window=4, sink=1), dim=64, heads=2, ffn_dim=256)


def recipe(stage: str, folder: Path, model: Backbone, **changes: Any) -> Recipe:
    """Of a backbone that is saved, on data that is not there; 4×6 latents."""
    if not (folder / "backbone").exists():
        save_backbone(folder / "backbone", model, {})
    method = METHODS.get(stage, {})
    if "window" in method:
        method = {**method, "window": {**method["window"], "crop": [4, 6]}}
    if stage == "dmd":
        method = {**method, "score": str(folder / "score")}
    values = {"stage": stage, "data": str(folder / "data"), "backbone": str(folder / "backbone"), "method": method}
    values |= {"run": RUN, "optimizers": {"generator": {}}}
    return build(Recipe, {**values, **changes})


def new_stage(name: str, backbone: Backbone, method: dict[str, Any]) -> Stage:
    if name == "bidirectional":
        return Bidirectional(build(BidirectionalConfig, method), backbone)
    if name == "autoregressive":
        return Autoregressive(build(AutoregressiveConfig, method), backbone)
    if name == "consistency":
        return Consistency(build(ConsistencyConfig, method), backbone)
    return DMD(build(DMDConfig, method), backbone, copy.deepcopy(backbone))


@pytest.mark.parametrize("name", METHODS)
def test_flops_of_a_step_are_those_that_a_counter_finds(
    name: str, tmp_path: Path, backbone: Backbone, new_clips: NewClips
) -> None:
    """Within 5 %: the first layers' inputs and the cameras' matrices need no gradient."""
    made = recipe(name, tmp_path, backbone)
    stage, draw = new_stage(name, backbone, made.method), Draw(0, 0, range(2))
    batch = stage.prepare(new_clips(2, 8), draw)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no CPU kernel
        for turn in stage.turns(0):
            loss, _ = stage.loss(turn, batch, draw)
            loss.backward()
    assert plan(made).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_rollout_costs_the_mean_of_its_numbers_of_steps_exits_and_windows(tmp_path: Path, backbone: Backbone) -> None:
    """Of two steps one comes before the exit in every other rollout; chunks before the window are denoised in full."""

    def plain(**method: Any) -> float:
        made = recipe("dmd", tmp_path, backbone)
        work = plan(replace(made, method={**made.method, "context_chunks": 0, **method})).work
        return {each.name: each.forward for each in work}["generator: steps before them, commits"]

    commits, both = plain(steps=[1]), plain(steps=[1, 2])
    exits = {each.name: each.forward for each in plan(recipe("dmd", tmp_path, backbone)).work}
    assert both == pytest.approx((commits + plain(steps=[2])) / 2)
    assert exits["generator: exit steps"] > plain(steps=[2]) - commits > 0
    assert plain(steps=[2], rollout_frames=10) > plain(steps=[2])


def test_memory_is_that_of_float32_states_in_the_parts_that_zero_makes_of_them(
    tmp_path: Path, backbone: Backbone
) -> None:
    count = sum(parameter.numel() for parameter in backbone.model.parameters())
    plain, mixed = (plan(recipe("dmd", tmp_path, backbone, run=RUN | {"bf16": bf16})) for bf16 in (False, True))
    trained, frozen = 2 * count, count  # generator and critic; the real score
    assert plain.states(0, 1) == 16 * trained + 4 * frozen + 4 * count
    assert plain.states(0, 4) == 16 * trained + 4 * frozen + count, "averages are spread"
    assert plain.states(1, 4) == (4 + 4 + 12 / 4) * trained + 4 * frozen + count
    assert plain.states(2, 4) == (4 + 4 / 4 + 12 / 4) * trained + 4 * frozen + count
    assert plain.states(3, 4) == (4 / 4 + 4 / 4 + 12 / 4) * trained + 4 * frozen + count
    assert mixed.states(2, 4) - plain.states(2, 4) == 2 * trained, "autocast's copies"
    assert plain.activations(checkpointed=True) < plain.activations(checkpointed=False)


def test_shapes_are_those_of_the_dataset_where_there_is_one(tmp_path: Path, backbone: Backbone) -> None:
    made = recipe("autoregressive", tmp_path, backbone)
    assert plan(made).size == (4, 6), "the crop's"
    whole = replace(made, method={"window": {"frames": 4}})
    assert (plan(whole).size, plan(whole).size_from) == ((12, 16), "assumed, 96×128 pixels")
    with ShardWriter(tmp_path / "data", CLIPS) as writer:
        writer.about = {"size": [64, 80]}
        writer.add("one", {"caption.txt": b"a hall"})
    assert plan(whole).size == (8, 10)
    assert plan(replace(whole, history=History(chunk=1, window=2))).frames == 8, "clean and noisy"


def test_a_published_backbone_is_planned_without_its_weights(tmp_path: Path, backbone: Backbone) -> None:
    made = recipe(
        "autoregressive", tmp_path, backbone, backbone="preset:wan2.1-t2v-14b", method={"window": {"frames": 20}}
    )
    found = plan(made)
    assert found.tokens == 1560
    assert found.networks[0].parameters == pytest.approx(14.29e9, rel=1e-3)


def test_a_stage_without_a_transformer_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="'autoencoder' trains no transformer, a dry run is for bidirectional, "):
        plan(recipe("autoencoder", tmp_path, backbone))


def test_the_command_prints_what_a_step_takes_and_trains_nothing(tmp_path: Path, backbone: Backbone) -> None:
    save_backbone(tmp_path / "backbone", backbone, {})
    path = tmp_path / "recipe.yaml"
    path.write_text("{stage: consistency, data: nowhere, run: {steps: 5, batch_size: 4}, optimizers: {generator: {}}}")
    settings = ["--set", f"backbone={tmp_path}/backbone", "--set", "method.guidance=2"]
    result = CliRunner().invoke(application(), ["train", str(path), "--dry-run", *settings], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for text in ("4 a step", "teacher, with guidance", "target", "ZeRO-3", "checkpointed", "GFLOP"):
        assert text in result.output, result.output
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["backbone"]
