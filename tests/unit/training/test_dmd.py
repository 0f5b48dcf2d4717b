"""Stage 4: the distribution-matching gradient by brute force, and who gets gradients from whom."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minwm.errors import ConfigError, InputError
from minwm.models.backbones import Backbone, load_backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Full, History
from minwm.models.prope import Cameras
from minwm.training.batch import Batch, WindowConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw

pytestmark = pytest.mark.unit

Record = Callable[[nn.Module], list[Any]]
NewStage = Callable[..., DMD]
STEPS = 4


@pytest.fixture
def new_stage(new_backbone: Callable[..., Backbone]) -> NewStage:
    """A student, the score of the data, and a critic that has begun to differ from it."""

    def make(history: History = History(chunk=2, window=4), **config: Any) -> DMD:  # noqa: B008 (frozen)
        stage = DMD(
            DMDConfig(**{"score": Path("unused"), "steps": (STEPS,), **config}),
            new_backbone(history, seed=1),
            new_backbone(history, seed=2),
        )
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in stage.networks["critic"].parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return stage

    return make


@pytest.mark.parametrize("given", [0, 1])
def test_generator_s_gradient_is_the_scores_difference_over_the_made_frames(
    new_stage: NewStage, batch: Batch, draw: Draw, record: Record, given: int
) -> None:
    """∂loss/∂θ = (x̂_fake − x̂_real) / mean|x − x̂_real| · ∂x/∂θ, averaged over the made elements."""
    stage = new_stage(context_chunks=given)
    real, critic = record(stage._real), record(stage.networks["critic"])
    loss, figures = stage.loss("generator", batch, draw)
    rollout = stage._roll_out(batch, draw, "generator")
    sample, made = rollout.latents, rollout.given
    assert made == 2 * given

    (fake_call,), (real_call,) = critic, real
    noisy, sigma = fake_call.latents, fake_call.sigma
    assert torch.equal(real_call.latents, noisy), "both scores see the same noisy sample"
    assert torch.equal(real_call.timesteps, fake_call.timesteps)
    fake = noisy - sigma * fake_call.output
    true = noisy - sigma * real_call.output
    gradient = torch.zeros_like(noisy)
    for b in range(3):
        gradient[b, made:] = (fake[b, made:] - true[b, made:]) / (sample[b] - true[b]).abs().mean().detach()
    count = sample[:, made:].numel()
    parameters = list(stage.networks["generator"].parameters())
    got = torch.autograd.grad(loss, parameters, retain_graph=True)
    expected = torch.autograd.grad(sample, parameters, grad_outputs=gradient / count)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(loss, 0.5 * (gradient[:, made:] ** 2).mean(), rtol=1e-4, atol=1e-8)
    assert figures["dmd_gradient"] == pytest.approx(float(gradient[:, made:].abs().mean()), rel=1e-4)


@pytest.mark.parametrize("turn", ["generator", "critic"])
def test_scores_are_asked_at_a_thousand_times_the_level_of_the_noise_that_was_added(
    new_stage: NewStage, batch: Batch, record: Record, turn: str
) -> None:
    stage = new_stage(min_level=0.3, max_level=0.9)
    calls = record(stage.networks["critic"])
    told = []
    for step in range(6):
        draw = Draw(4, step, range(3))
        stage.loss(turn, batch, draw)
        with torch.no_grad():
            sample = stage._roll_out(batch, draw, turn).latents
        call = calls[-1]
        noise = (call.latents - (1 - call.sigma) * sample) / call.sigma
        for b in range(3):
            assert abs(noise[b].mean()) < 0.15, "with another level, the rest would not be standard noise"
            assert noise[b].std() == pytest.approx(1, abs=0.1)
        assert torch.equal(noise.std((1, 2, 3, 4)) > 0, torch.ones(3, dtype=torch.bool))
        assert (call.timesteps == call.timesteps[:, :1]).all(), "a clip has one level"
        assert call.context == Full(8)
        assert torch.equal(call.conditions.cameras.viewmats, batch.conditions.cameras.viewmats)
        told += call.timesteps[:, 0].tolist()
    assert 300 <= min(told) < max(told) <= 900
    assert len(set(told)) > 6


def test_critic_learns_the_velocity_of_the_student_s_samples(
    new_stage: NewStage, batch: Batch, draw: Draw, record: Record
) -> None:
    stage = new_stage()
    calls = record(stage.networks["critic"])
    loss, _ = stage.loss("critic", batch, draw)
    with torch.no_grad():
        sample = stage._roll_out(batch, draw, "critic").latents
    (call,) = calls
    expected = (call.output - (call.latents - sample) / call.sigma).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("turn", "other"), [("generator", "critic"), ("critic", "generator")])
def test_each_loss_reaches_its_own_network_alone(
    new_stage: NewStage, batch: Batch, draw: Draw, turn: str, other: str
) -> None:
    stage = new_stage()
    loss, _ = stage.loss(turn, batch, draw)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in stage.networks[turn].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    for network in (stage.networks[other], *stage.fixed.values(), *stage.frozen.values()):
        assert all(parameter.grad is None for parameter in network.parameters())


def test_of_each_chunk_only_the_exit_step_s_forward_carries_gradient(
    new_stage: NewStage, batch: Batch, record: Record
) -> None:
    stage = new_stage(context_chunks=1)
    calls = record(stage.networks["generator"])
    levels = [1000 * level for level in stage._backbone.config.sampling_levels(STEPS)]
    exits = set()
    for step in range(12):
        calls.clear()
        stage.loss("generator", batch, Draw(0, step, range(3)))
        carrying = [call for call in calls if call.with_gradient]
        assert len(carrying) == 3, "one forward of each of the three chunks that are made"
        (exit_level,) = {float(call.timesteps.unique()) for call in carrying}
        exit_step = min(range(STEPS), key=lambda i: abs(levels[i] - exit_level))
        exits.add(exit_step)
        # the given chunk's commit; then of each chunk the steps up to the exit, and its commit if one follows
        visited = [float(call.timesteps.unique()) for call in calls]
        assert visited == pytest.approx([0.0, *(3 * [*levels[: exit_step + 1], 0.0])][:-1])
    assert exits == set(range(STEPS))


def test_the_sample_starts_with_the_true_chunks_and_continues_from_its_own(
    new_stage: NewStage, batch: Batch, draw: Draw, record: Record
) -> None:
    stage = new_stage(context_chunks=1)
    calls = record(stage.networks["generator"])
    rollout = stage._roll_out(batch, draw, "generator")
    sample = rollout.latents
    assert rollout.given == 2
    assert sample.shape == batch.latents.shape
    assert torch.equal(sample[:, :2], batch.latents[:, :2])
    commits = [call for call in calls if float(call.timesteps.max()) == 0]
    for number, call in enumerate(commits):
        assert torch.equal(call.latents, sample[:, 2 * number : 2 * number + 2]), "history is what was generated"
        frames = batch.conditions.frames(2 * number, 2 * number + 2)
        assert torch.equal(call.conditions.cameras.viewmats, frames.cameras.viewmats)


def test_a_window_that_is_no_multiple_of_the_chunk_is_refused(new_stage: NewStage) -> None:
    with pytest.raises(InputError, match="frames=8: expected a multiple of the chunk, 3 latent frames"):
        new_stage(History(chunk=3, window=5))


def test_guidance_moves_the_real_score_away_from_what_it_says_without_a_prompt(
    new_stage: NewStage, batch: Batch, draw: Draw, record: Record
) -> None:
    stage = new_stage(guidance=3.0)
    real, critic = record(stage._real), record(stage.networks["critic"])
    loss, _ = stage.loss("generator", batch, draw)
    rollout = stage._roll_out(batch, draw, "generator")
    sample, made = rollout.latents, rollout.given
    prompted, bare = real
    assert torch.equal(bare.prompt.layers[0][0], stage._real.prompt(torch.zeros_like(batch.text)).layers[0][0])
    velocity = bare.output + 3.0 * (prompted.output - bare.output)
    true = prompted.latents - prompted.sigma * velocity
    fake = critic[0].latents - critic[0].sigma * critic[0].output
    scale = (sample - true).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = 0.5 * (((fake - true) / scale)[:, made:] ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-8)


def test_the_generator_is_updated_once_in_every_ratio_critic_updates(new_stage: NewStage) -> None:
    stage = new_stage(critic_ratio=3)
    turns = [turn for step in range(9) for turn in stage.turns(step)]
    assert turns.count("critic") == 9
    assert turns.count("generator") == 3


def test_the_average_follows_the_generator_s_updates_and_is_what_is_exported(
    new_stage: NewStage, tmp_path: Path
) -> None:
    stage = new_stage(critic_ratio=2, ema_decay=0.75)
    average, student = stage.frozen["average"], stage.networks["generator"]
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    stage.after_step(1)  # a critic's step
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    stage.after_step(2)
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.25)
    stage.export(tmp_path / "model", {})
    exported = load_backbone(tmp_path / "model").model.state_dict()
    for name, value in average.state_dict().items():
        assert torch.equal(exported[name], value.bfloat16().float()), name


def test_a_rollout_that_would_generate_nothing_is_refused(new_stage: NewStage) -> None:
    with pytest.raises(ConfigError, match=r"context_chunks=4: gives 8 frames, expected fewer than window\.frames=8"):
        new_stage(context_chunks=4)


def test_the_number_of_steps_is_drawn_for_the_whole_step_and_all_of_them_are_exported(
    new_stage: NewStage, batch: Batch, record: Record, tmp_path: Path
) -> None:
    stage = new_stage(steps=(4, 2, 1))
    calls = record(stage.networks["generator"])
    config, drawn = stage._backbone.config, set()
    for step in range(80):
        draws = [Draw(0, step, range(first, first + 1)) for first in range(3)]
        plans = {stage._plan(draw, "generator") for draw in draws}
        assert len(plans) == 1, "samples of a step, on whatever rank, share it"
        ((levels, exit_step),) = plans
        drawn.add((len(levels), exit_step))
        assert levels == config.sampling_levels(len(levels))
        if step > 3:
            continue
        calls.clear()
        with torch.no_grad():
            stage._roll_out(batch, Draw(0, step, range(3)), "generator")
        asked = [float(call.timesteps.unique()) / 1000 for call in calls if call.timesteps.any()]
        assert asked == pytest.approx(3 * list(levels[: exit_step + 1]))
    assert len(drawn) == 4 + 2 + 1, "every step of every number of steps is an exit"
    stage.export(tmp_path / "model", {})
    assert list(load_backbone(tmp_path / "model").config.levels) == [1, 2, 4]


def test_a_rollout_goes_past_the_window_that_is_scored_and_only_the_window_carries_gradient(
    new_stage: NewStage, new_clips: Callable[[int, int], list[Any]], record: Record
) -> None:
    """Windows of 4 of rollouts of 10 frames: before the window the student denoises in full, as it is served."""
    stage = new_stage(window=WindowConfig(frames=4), rollout_frames=10, steps=(2,))
    student, critic = record(stage.networks["generator"]), record(stage.networks["critic"])
    clips, starts = new_clips(2, 12), set()
    for step in range(12):
        draw = Draw(0, step, range(2))
        batch = stage.prepare(clips, draw)
        assert batch.latents.shape[1] == 10, "there are cameras for all of it"
        student.clear()
        loss, _ = stage.loss("generator", batch, draw)
        start = 2 * draw.shared_integer("generator window", 4)
        starts.add(start)
        given = max(0, 2 - start)
        positions = [call.context.positions[0] for call in student if call.with_gradient]
        assert positions == list(range(start + given, start + 4, 2)), "one forward of each chunk made in the window"
        before = [call for call in student if call.timesteps.any() and call.context.positions[0] < start]
        assert len(before) == 2 * max(0, (start - 2) // 2), "both steps of each chunk before it"
        assert not any(call.with_gradient for call in before)
        assert max(call.context.positions[-1] for call in student) == start + 3, "nothing is made after it"

        with torch.no_grad():
            sample = stage._roll_out(batch, draw, "generator")
        call = critic[-1]
        assert call.latents.shape == sample.latents.shape == (2, 4, *batch.latents.shape[2:])
        true = batch.conditions.cameras.viewmats
        for b in range(2):
            for f in range(4):
                expected = true[b, start + f].double() @ true[b, start].double().inverse()
                seen = call.conditions.cameras.viewmats[b, f].double()
                torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4, msg=lambda m, f=f: f"frame {f}: {m}")
        assert torch.equal(call.conditions.cameras.motions, batch.conditions.cameras.motions[:, start : start + 4])
        assert torch.equal(call.conditions.actions, batch.conditions.actions[:, start : start + 4])
        first = batch.latents[:, 0] if start == 0 else sample.latents[:, 0]
        torch.testing.assert_close(call.conditions.image[:, :-1], first)
        loss.backward()  # type: ignore[no-untyped-call]
    assert starts == {0, 2, 4, 6}, "every aligned window is scored, the last one too"


def test_a_window_s_loss_is_that_of_a_clip_which_begins_there(
    new_stage: NewStage, new_clips: Callable[[int, int], list[Any]]
) -> None:
    """Given the sample, where in the rollout it lay is no matter: loss and scores see a clip of its own."""
    stage = new_stage(window=WindowConfig(frames=4), rollout_frames=10, steps=(2,), context_chunks=0)
    draw = next(d for d in (Draw(0, s, range(2)) for s in range(99)) if d.shared_integer("critic window", 4) == 2)
    batch = stage.prepare(new_clips(2, 12), draw)
    loss, _ = stage.loss("critic", batch, draw)
    with torch.no_grad():
        sample = stage._roll_out(batch, draw, "critic").latents
    cameras = batch.conditions.cameras.frames(4, 8)
    anchored = Cameras(cameras.viewmats @ cameras.viewmats[:, :1].inverse(), cameras.intrinsics, cameras.motions)
    sigma = stage._score_levels(draw, "critic", stage._roll_out(batch, draw, "critic"))
    noise = draw.normal("critic score noise", sample.shape[1:])
    level = sigma[:, :, None, None, None]
    critic = stage.networks["critic"]
    noisy = (1 - level) * sample + level * noise
    prompt = critic.prompt(batch.text, bidirectional=True)
    output = critic(noisy, 1000 * sigma, prompt, Full(4), Conditions(cameras=anchored))
    torch.testing.assert_close(loss, (output - (noise - sample)).square().mean(), rtol=1e-3, atol=1e-5)


def test_what_is_committed_may_be_noisy_and_is_told_as_clean(new_stage: NewStage, batch: Batch, record: Record) -> None:
    plain, noisy = new_stage(), new_stage(context_noise=0.3)
    commits = []
    for stage in (plain, noisy):
        calls = record(stage.networks["generator"])
        stage._roll_out(batch, Draw(0, 0, range(3)), "generator")
        commits.append([call.latents for call in calls if not call.timesteps.any()])
    true = batch.latents[:, :2]
    assert torch.equal(commits[0][0], true)
    for b in range(3):
        error = commits[1][0][b] - true[b]
        assert 0 < error.square().mean().sqrt() < 0.3 * 1.6, "at most the level times noise less data"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"steps": ()}, "expected different numbers of sampling steps"),
        ({"critic_ratio": 0}, "critic_ratio=0"),
        ({"context_chunks": -1}, "context_chunks=-1"),
        ({"context_noise": 1.0}, r"context_noise=1\.0"),
        ({"min_level": 0.9, "max_level": 0.1}, r"min_level=0\.9, max_level=0\.1"),
        ({"rollout_frames": 4}, r"rollout_frames=4: expected at least window\.frames=8"),
    ],
)
def test_an_impossible_configuration_is_refused(new_stage: NewStage, wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        new_stage(**wrong)


def test_a_rollout_that_is_no_multiple_of_the_chunk_is_refused(new_stage: NewStage) -> None:
    with pytest.raises(InputError, match="frames=9: expected a multiple of the chunk, 2 latent frames"):
        new_stage(rollout_frames=9)


def test_a_gradient_s_value_survives_however_small_it_is_beside_the_sample(new_stage: NewStage, batch: Batch) -> None:
    """The loss is half the mean square of the gradient, also where float32 would lose it beside the sample."""
    stage, draw = new_stage(steps=(1,)), Draw(0, 0, range(3))
    with torch.no_grad():
        for mine, data in zip(stage.networks["critic"].parameters(), stage._real.parameters(), strict=True):
            mine.copy_(data + 1e-7 * torch.randn_like(data))
    big = replace(batch, latents=1000 * batch.latents)
    loss, figures = stage.loss("generator", big, draw)
    assert loss.dtype == torch.float32
    assert 0 < figures["dmd_gradient"] < 1e-4
    assert loss.item() >= 0.5 * figures["dmd_gradient"] ** 2, "the mean square is at least the square of the mean"
