"""Mistakes that minWM's training code makes, each as the behaviour that is right."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minwm.data.clips import Clip
from minwm.diffusion.flow import schedule
from minwm.geometry.actions import describe, from_keys, from_poses
from minwm.geometry.live import Speeds, advance, velocity_from_keys
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Full, History, teacher_forcing
from minwm.models.rollout import ChunkRollout
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.engine import OptimizerConfig
from minwm.training.loop import RunConfig, train
from minwm.training.ode import Ode, OdeConfig
from minwm.training.stage import Stage
from minwm.training.trajectories import SamplingConfig, load_trajectories, write_trajectories

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
NewClips = Callable[[int, int], list[Clip]]
NewConditions = Callable[[int, int], Conditions]
Record = Callable[[nn.Module], list[Any]]
WINDOW = WindowConfig(frames=4)
STAGES = ("bidirectional", "autoregressive", "consistency", "ode", "dmd")


@pytest.fixture
def new_stage(new_backbone: NewBackbone, new_clips: NewClips, tmp_path: Path) -> Callable[[str], tuple[Stage, Any]]:
    """Makes a stage by name, and four samples for it."""

    def make(name: str) -> tuple[Stage, Any]:
        backbone, clips = new_backbone(seed=1), new_clips(4, 6)
        if name == "bidirectional":
            return Bidirectional(BidirectionalConfig(window=WINDOW), backbone), clips
        if name == "autoregressive":
            return Autoregressive(AutoregressiveConfig(window=WINDOW), backbone), clips
        if name == "consistency":
            return Consistency(ConsistencyConfig(window=WINDOW, guidance=2.0), backbone), clips
        if name == "dmd":
            config = DMDConfig(window=WINDOW, score=Path("unused"), steps=(2, 1), rollout_frames=6)
            return DMD(config, backbone, new_backbone(seed=2)), clips
        folder = tmp_path / "trajectories"
        if not folder.exists():
            config = SamplingConfig(window=WINDOW, windows=4, steps=(2, 1), ode_steps=2)
            write_trajectories(new_backbone(seed=1), clips, config, folder, {})
        trajectories = load_trajectories(folder)
        return Ode(OdeConfig(), backbone, trajectories), trajectories.samples

    return make


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_model_tells_neighbouring_timesteps_apart_under_bf16_autocast_too(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: Callable[..., Any], kind: str
) -> None:
    """minWM rounds timesteps to bf16: 978.3 and 979.5 are both 980 there, and 973.4 is 972."""
    backbone = new_backbone(kind=kind)
    prompt = backbone.model.prompt(new_text(backbone.config.architecture, 1), bidirectional=True)
    latents, conditions = torch.randn(1, 2, 4, 4, 6), new_conditions(1, 2)

    def answer(timestep: float) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return backbone.model(latents, torch.full((1, 2), timestep), prompt, Full(2), conditions).float()

    rounded = float(torch.tensor(978.3).bfloat16())
    assert float(torch.tensor(979.5).bfloat16()) == rounded == 980, "bf16 could not tell these two"
    for other in (979.5, 973.4, rounded):
        assert not torch.equal(answer(978.3), answer(other)), f"978.3 and {other} look alike"


def test_the_intervals_of_the_ode_are_float32_ones_where_bf16_would_be_off_by_two_thirds(
    new_backbone: NewBackbone, batch: Batch, record: Record
) -> None:
    stage = Consistency(ConsistencyConfig(window=WindowConfig(frames=8)), new_backbone())
    theirs, slow = record(stage.fixed["teacher"]), record(stage.frozen["target"])
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(3):
            stage.loss("generator", batch, Draw(0, step, range(3)))
    levels = torch.tensor([*schedule(50, 3.0), 0.0], dtype=torch.float64) * 1000
    for told, following in ((a.timesteps[:, 8:], b.timesteps[:, 8:]) for a, b in zip(theirs, slow, strict=True)):
        place = (levels - told[..., None].double()).abs().argmin(-1)
        exact = levels[place] - levels[place + 1]
        torch.testing.assert_close((told - following).double(), exact, rtol=1e-4, atol=1e-4)
    first, second = levels[:2].bfloat16().double()
    assert abs(float((first - second) / (levels[0] - levels[1])) - 1) > 0.1, "in bf16 the first step would be wrong"


@pytest.mark.parametrize("turn", ["generator", "critic"])
def test_scores_are_asked_at_the_timestep_of_the_noise_really_added_not_at_a_thousand_less_it(
    new_backbone: NewBackbone, batch: Batch, record: Record, turn: str
) -> None:
    """The level is recovered by regression from what the scores were shown, knowing sample and noise."""
    stage = DMD(DMDConfig(score=Path("unused"), steps=(1,), max_level=0.4), new_backbone(seed=1), new_backbone(seed=2))
    calls = [record(network) for network in (stage.networks["critic"], stage._real)]
    draw = Draw(0, 0, range(3))
    stage.loss(turn, batch, draw)
    with torch.no_grad():
        sample = stage._roll_out(batch, draw, turn).latents.double()
    noise = draw.normal(f"{turn} score noise", sample.shape[1:]).double()
    asked = [call for watched in calls for call in watched]
    assert len(asked) == (2 if turn == "generator" else 1)
    for call in asked:
        towards, along = call.latents.double() - sample, noise - sample
        level = (towards * along).sum((1, 2, 3, 4)) / along.square().sum((1, 2, 3, 4))
        torch.testing.assert_close(call.timesteps[:, 0].double(), 1000 * level, rtol=1e-4, atol=1e-2)
        assert (call.timesteps < 500).all(), "little noise, small timesteps"


@pytest.mark.parametrize("name", STAGES)
def test_losses_and_gradients_of_a_batch_s_parts_average_to_the_batch_s(
    new_stage: Callable[[str], tuple[Stage, Any]], name: str
) -> None:
    """Accumulation is what the word says, for every network of every stage."""
    stage, samples = new_stage(name)
    for turn in stage.turns(0):
        parameters = list(stage.networks[turn].parameters())

        def evaluate(
            numbers: list[int], turn: str = turn, parameters: list[nn.Parameter] = parameters
        ) -> list[torch.Tensor]:
            draw = Draw(0, 0, numbers)
            loss, _ = stage.loss(turn, stage.prepare([samples[n] for n in numbers], draw), draw)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [loss.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in gradients)]

        whole, parts = evaluate([0, 1, 2, 3]), [evaluate([0, 1]), evaluate([2, 3])]
        for one, *others in zip(whole, *parts, strict=True):
            torch.testing.assert_close(torch.stack(others).mean(0), one, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", STAGES)
def test_ranks_that_share_a_sample_share_its_noise_and_others_do_not(
    new_stage: Callable[[str], tuple[Stage, Any]], record: Record, name: str
) -> None:
    """Whatever else a process holds, it shows the network the same sample 2; sample 1 gets other noise."""
    stage, samples = new_stage(name)
    calls, shown = record(stage.networks["generator"]), []
    for numbers in ([2], [1, 2]):
        torch.manual_seed(len(numbers))  # a rank's own state is no matter
        draw = Draw(0, 0, numbers)
        calls.clear()
        stage.loss("generator", stage.prepare([samples[2]] * len(numbers), draw), draw)
        shown.append([(call.latents, call.timesteps) for call in calls if call.timesteps.any()])
    for (one, level), (two, levels) in zip(*shown, strict=True):
        torch.testing.assert_close(one[0], two[1], rtol=1e-4, atol=1e-4)
        assert torch.equal(level[0], levels[1])
        assert not torch.equal(two[0], two[1])


def test_the_last_interval_is_drawn_as_often_as_any(new_backbone: NewBackbone, new_clips: NewClips) -> None:
    """Whoever draws from one fewer never teaches the step that ends at the data."""
    stage = Consistency(ConsistencyConfig(window=WINDOW, intervals=5), new_backbone())
    told: list[torch.Tensor] = []
    stage._target.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1][:, 4::2]))
    clips = new_clips(4, 4)
    with torch.no_grad():
        for step in range(20):
            draw = Draw(0, step, range(4))
            stage.loss("generator", stage.prepare(clips, draw), draw)
    levels = torch.tensor([*schedule(5, 3.0)[1:], 0.0]) * 1000
    counts = torch.bincount((torch.cat(told).flatten()[:, None] - levels).abs().argmin(1), minlength=5)
    assert counts.sum() == 160
    assert counts.min() > 16, f"each of 5 intervals should be drawn about 32 times, was {counts.tolist()}"


@torch.no_grad()
@pytest.mark.parametrize("sink", [0, 1])
def test_the_mask_of_training_knows_the_window_and_the_sink(
    new_backbone: NewBackbone, new_conditions: NewConditions, sink: int
) -> None:
    """One layer, so that what a chunk sees is what its output depends on: the frames that a cache would keep."""
    history = History(chunk=2, window=4, sink=sink)
    backbone, conditions = new_backbone(history, layers=1), new_conditions(1, 8)
    prompt, timesteps = backbone.model.prompt(torch.zeros(1, 12, dtype=torch.int64)), torch.full((1, 16), 500.0)

    def answer(latents: torch.Tensor) -> torch.Tensor:
        return backbone.model(latents, timesteps, prompt, teacher_forcing(8, history), conditions.repeat_frames(2))

    latents = torch.randn(1, 16, 4, 4, 6)
    before = answer(latents)
    for changed in range(8):
        other = latents.clone()
        other[:, changed] += 1
        moved = (answer(other) - before).abs().amax((0, 2, 3, 4))[8:] > 1e-6
        last = range(2 * (changed // 2) + 2, 8)
        expected = [f in last and (changed >= f // 2 * 2 + 2 - 4 or changed < sink) for f in range(8)]
        assert moved.tolist() == expected, f"clean frame {changed}"


@pytest.mark.parametrize(
    ("key", "action"),
    [("w", "forward"), ("s", "back"), ("a", "left"), ("d", "right"), ("l", "yaw right"), ("j", "yaw left")],
)
def test_left_is_left_whether_it_was_typed_or_read_off_poses(key: str, action: str) -> None:
    pose = advance(np.eye(4), velocity_from_keys([key], Speeds(move=4.0, turn=40.0)), 0.25)
    (_, read) = from_poses(np.stack([np.eye(4), pose]))
    assert describe(int(read)) == describe(from_keys([key])) == action


def test_a_resumed_run_equals_the_uninterrupted_one_optimizer_state_included(
    new_stage: Callable[[str], tuple[Stage, Any]], tmp_path: Path
) -> None:
    """Without Adam's moments the first step after the resume would differ."""

    class Interrupted(Exception):
        pass

    def stop(done: int, of: int, figures: dict[str, float]) -> None:
        if done == 3:
            raise Interrupted

    run = RunConfig(steps=4, batch_size=2, engine="torch", checkpoint_every=2)
    optimizers = {"generator": OptimizerConfig(learning_rate=1e-2)}
    states = []
    for folder, interrupted in (("whole", False), ("stopped", True)):
        stage, samples = new_stage("autoregressive")
        if interrupted:
            with pytest.raises(Interrupted):
                train(stage, samples, run, optimizers, tmp_path / folder, {}, stop)
            stage, samples = new_stage("autoregressive")
        train(stage, samples, run, optimizers, tmp_path / folder, {})
        states.append(stage.networks["generator"].state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), f"{name} differs after the resume"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_clean_history_gets_its_action_s_embedding_in_training_as_in_a_session(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: Callable[..., Any], kind: str
) -> None:
    """minWM's HunyuanVideo trains clean chunks without the action that its rollout gives them."""
    history = History(chunk=2, window=4)
    backbone = new_backbone(history, kind=kind, conditions=("camera_prope", "action_timestep"))
    model, conditions = backbone.model, new_conditions(1, 4)
    prompt = model.prompt(new_text(backbone.config.architecture, 1))
    clean, noisy = torch.randn(1, 4, 4, 4, 6), torch.randn(1, 4, 4, 4, 6)
    timesteps = torch.cat([torch.zeros(1, 4), torch.full((1, 4), 600.0)], 1)
    both = model(
        torch.cat([clean, noisy], 1), timesteps, prompt, teacher_forcing(4, history), conditions.repeat_frames(2)
    )
    rollout = ChunkRollout(model, history, (4, 4, 6))
    rollout.commit(clean[:, :2], prompt, conditions.frames(0, 2))
    now = conditions.frames(2, 4)
    torch.testing.assert_close(rollout.velocity(noisy[:, 2:], 0.6, prompt, now), both[:, 6:], rtol=0, atol=1e-4)
    other = ChunkRollout(model, history, (4, 4, 6))
    still = replace(conditions.frames(0, 2), actions=(conditions.frames(0, 2).actions + 1) % 81)
    other.commit(clean[:, :2], prompt, still)
    assert not torch.allclose(other.velocity(noisy[:, 2:], 0.6, prompt, now), both[:, 6:], atol=1e-4), "it matters"


def test_dropping_the_prompt_is_the_empty_prompt_that_guidance_is_measured_against(
    new_backbone: NewBackbone, new_clips: NewClips, record: Record
) -> None:
    """What dropout trains and what guidance asks are one and the same, in every byte."""
    backbone = new_backbone()
    dropped = cut_windows(new_clips(2, 4), Draw(0, 0, range(2)), replace(WINDOW, prompt_dropout=1.0), backbone.encode)
    stage = Consistency(ConsistencyConfig(window=WINDOW, guidance=3.0), backbone)
    prompted = cut_windows(new_clips(2, 4), Draw(0, 0, range(2)), replace(WINDOW, prompt_dropout=0.0), backbone.encode)
    calls = record(stage.fixed["teacher"])
    stage.loss("generator", prompted, Draw(0, 0, range(2)))
    trained = stage.fixed["teacher"].prompt(dropped.text)
    for (k, v), (asked_k, asked_v) in zip(trained.layers, calls[1].prompt.layers, strict=True):
        assert torch.equal(k, asked_k)
        assert torch.equal(v, asked_v)
    assert not torch.equal(calls[0].prompt.layers[0][0], calls[1].prompt.layers[0][0])
