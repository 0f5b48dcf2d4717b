"""Stage 4: the distribution-matching gradient by brute force, and who gets gradients from whom."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minwm.errors import ConfigError, InputError
from minwm.models.backbones import Backbone, load_backbone
from minwm.models.context import Full, History
from minwm.training.batch import Batch
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
    for network in (stage.networks[other], stage._real, *stage.frozen.values()):
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
    before = [parameter.clone() for parameter in average.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    stage.after_step(1)  # a critic's step
    assert all(torch.equal(a, b) for a, b in zip(before, average.parameters(), strict=True))
    stage.after_step(2)
    for old, new in zip(before, average.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
    stage.export(tmp_path / "model", {})
    exported = load_backbone(tmp_path / "model").model.state_dict()
    for name, value in average.state_dict().items():
        assert torch.equal(exported[name], value.bfloat16().float()), name


def test_a_rollout_that_would_generate_nothing_is_refused(new_stage: NewStage) -> None:
    with pytest.raises(ConfigError, match=r"context_chunks=4: gives 8 frames, expected fewer than window\.frames=8"):
        new_stage(context_chunks=4)
