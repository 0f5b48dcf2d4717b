"""The cached chunk rollout that self-rollout and serving share."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minwm.errors import InputError
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import History, teacher_forcing
from minwm.models.rollout import ChunkRollout

pytestmark = pytest.mark.unit

NewBackbone = Callable[[History], Backbone]
NewConditions = Callable[[int, int], Conditions]
HISTORY = History(chunk=2, window=5, sink=1)
FRAMES = 12
LEVELS = (1.0, 0.6, 0.2)


@pytest.fixture
def noise() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(len(LEVELS), 2, FRAMES, 4, 4, 6)


@torch.no_grad()
def test_sampling_from_the_cache_equals_sampling_under_the_teacher_forcing_mask(
    new_backbone: NewBackbone, new_conditions: NewConditions, noise: Tensor
) -> None:
    """Chunk after chunk, in several steps, as if every step saw the whole clean past through the mask.

    Without a sink: one that the window has left behind is placed afresh (test_unbounded.py), which no mask can say.
    """
    history = replace(HISTORY, sink=0)
    model, conditions = new_backbone(history).model, new_conditions(2, FRAMES)
    prompt = model.prompt(torch.randint(1, 257, (2, 12)))
    rollout = ChunkRollout(model, history, (4, 4, 6), batch=2)
    context = teacher_forcing(FRAMES, history)
    clean = torch.zeros(2, FRAMES, 4, 4, 6)  # what is still to come is masked, so zeros do
    for start in range(0, FRAMES, 2):
        now = slice(start, start + 2)
        x = noise[0][:, now]
        for step, level in enumerate(LEVELS):
            noisy, timesteps = torch.zeros_like(clean), torch.zeros(2, FRAMES)
            noisy[:, now], timesteps[:, now] = x, 1000 * level
            both, twice = torch.cat([clean, noisy], 1), torch.cat([torch.zeros(2, FRAMES), timesteps], 1)
            velocity = model(both, twice, prompt, context, conditions.repeat_frames(2))[:, FRAMES:][:, now]
            x = x - level * velocity
            if step + 1 < len(LEVELS):
                x = (1 - LEVELS[step + 1]) * x + LEVELS[step + 1] * noise[step + 1][:, now]
        clean[:, now] = x

        seen = conditions.frames(start, start + 2)
        got = rollout.denoise(noise[0][:, now], prompt, seen, LEVELS, lambda i, now=now: noise[i + 1][:, now])
        torch.testing.assert_close(got, x, rtol=0, atol=2e-4, msg=lambda m, start=start: f"frame {start}: {m}")
        rollout.commit(got, prompt, seen)
    assert rollout.frames == FRAMES


@torch.no_grad()
def test_denoising_before_the_commit_leaves_the_past_as_it_was(
    new_backbone: NewBackbone, new_conditions: NewConditions, noise: Tensor
) -> None:
    """A chunk may be tried with other conditions and noise, and then made again, the same."""
    model, conditions = new_backbone(HISTORY).model, new_conditions(2, FRAMES)
    prompt = model.prompt(torch.randint(1, 257, (2, 12)))
    rollout = ChunkRollout(model, HISTORY, (4, 4, 6), batch=2)
    for start in range(0, FRAMES - 2, 2):
        rollout.commit(noise[0][:, start : start + 2], prompt, conditions.frames(start, start + 2))
    last, seen = noise[0][:, -2:], conditions.frames(FRAMES - 2, FRAMES)

    def again() -> Tensor:
        return rollout.denoise(last, prompt, seen, LEVELS, lambda i: noise[i + 1][:, -2:])

    first = again()
    rollout.denoise(-last, prompt, conditions.frames(0, 2), LEVELS, lambda i: last)
    assert torch.equal(again(), first)


def test_a_pass_is_one_chunk_of_every_stream(
    new_backbone: NewBackbone, new_conditions: NewConditions, noise: Tensor
) -> None:
    model, conditions = new_backbone(HISTORY).model, new_conditions(2, FRAMES)
    prompt = model.prompt(torch.randint(1, 257, (2, 12)))
    rollout = ChunkRollout(model, HISTORY, (4, 4, 6), batch=2)
    for frames in (1, 4):
        with pytest.raises(InputError, match=f"frames={frames}: expected one chunk, 2 latent frames"):
            rollout.commit(noise[0][:, :frames], prompt, conditions.frames(0, frames))
    one = conditions.streams(slice(0, 1)).frames(0, 2)
    with pytest.raises(InputError, match=r"keys and values have shape .*, expected .* as the cache"):
        rollout.commit(noise[0][:1, :2], model.prompt(torch.randint(1, 257, (1, 12))), one)


def test_gradient_flows_through_the_exit_step_alone(
    new_backbone: NewBackbone, new_conditions: NewConditions, noise: Tensor
) -> None:
    """The exit step's prediction is the result; what came before it is a constant."""
    model, conditions = new_backbone(HISTORY).model, new_conditions(2, FRAMES)
    prompt = model.prompt(torch.randint(1, 257, (2, 12))).detach()
    rollout = ChunkRollout(model, HISTORY, (4, 4, 6), batch=2)
    rollout.commit(noise[0][:, :2], prompt, conditions.frames(0, 2))
    seen = conditions.frames(2, 4)
    start = noise[0][:, 2:4].clone().requires_grad_()
    out = rollout.denoise(start, prompt, seen, LEVELS, lambda i: noise[i + 1][:, 2:4], exit_step=1)
    weight = model.blocks[0].ffn[0].weight
    gradient = torch.autograd.grad(out.square().sum(), [weight, start], allow_unused=True)
    assert gradient[1] is None, "the noise is only seen by the first step, which carries no gradient"

    with torch.no_grad():
        x0 = rollout.denoise(noise[0][:, 2:4], prompt, seen, LEVELS[:1], lambda i: noise[0])
        x = (1 - LEVELS[1]) * x0 + LEVELS[1] * noise[1][:, 2:4]
    alone = rollout.denoise(x, prompt, seen, LEVELS[1:2], lambda i: noise[0])
    torch.testing.assert_close(alone, out)
    torch.testing.assert_close(torch.autograd.grad(alone.square().sum(), weight)[0], gradient[0])
