"""How teachers sample: guidance from two caches, and whole clips given their first frames."""

from collections.abc import Callable

import pytest
import torch

from minwm.diffusion.flow import schedule
from minwm.errors import InputError
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Full, History, teacher_forcing
from minwm.models.rollout import ChunkRollout
from minwm.models.sampling import Guidance, TeacherRollout, sample_clip

pytestmark = pytest.mark.unit

NewConditions = Callable[[int, int], Conditions]
HISTORY, FRAMES = History(chunk=2, window=4), 6
LEVELS = schedule(3, 3.0)


@torch.no_grad()
def test_a_guided_rollout_follows_the_two_prompts_each_given_its_own_past(
    new_backbone: Callable[[History], Backbone], new_conditions: NewConditions
) -> None:
    """By brute force: under the mask, on the whole clip, a pass for each prompt and step."""
    torch.manual_seed(5)
    model, conditions = new_backbone(HISTORY).model, new_conditions(2, FRAMES)
    prompt, bare = model.prompt(torch.randint(1, 257, (2, 12))), model.prompt(torch.zeros(2, 12, dtype=torch.int64))
    rollout = TeacherRollout(model, HISTORY, (4, 4, 6), Guidance(prompt, bare, 2.5), batch=2)
    noise, true = torch.randn(2, FRAMES, 4, 4, 6), torch.randn(2, FRAMES, 4, 4, 6)
    x = noise
    for level, following in zip(LEVELS, [*LEVELS[1:], 0.0], strict=True):
        timesteps = torch.cat([torch.zeros(2, FRAMES), torch.full((2, FRAMES), 1000 * level)], 1)
        both, twice = torch.cat([true, x], 1), conditions.repeat_frames(2)
        with_it, without = (
            model(both, timesteps, text, teacher_forcing(FRAMES, HISTORY), twice)[:, FRAMES:] for text in (prompt, bare)
        )
        x = x + (following - level) * (without + 2.5 * (with_it - without))
    made = []
    for start in range(0, FRAMES, 2):
        now, seen = slice(start, start + 2), conditions.frames(start, start + 2)
        made.append(rollout.denoise(noise[:, now], seen, LEVELS))
        rollout.commit(true[:, now], seen)
    torch.testing.assert_close(torch.cat(made, 1), x, rtol=0, atol=5e-4)
    assert rollout.frames == FRAMES


@torch.no_grad()
def test_without_guidance_a_teacher_s_rollout_is_the_plain_one(
    new_backbone: Callable[[History], Backbone], new_conditions: NewConditions
) -> None:
    model, conditions = new_backbone(HISTORY).model, new_conditions(1, 2)
    prompt, noise = model.prompt(torch.randint(1, 257, (1, 12))), torch.randn(1, 2, 4, 4, 6)
    plain = ChunkRollout(model, HISTORY, (4, 4, 6)).denoise_ode(noise, prompt, conditions, LEVELS)
    teacher = TeacherRollout(model, HISTORY, (4, 4, 6), Guidance(prompt))
    states = list(teacher.path(noise, conditions, LEVELS))
    assert len(states) == len(LEVELS) + 1
    assert torch.equal(states[0], noise)
    assert torch.equal(states[-1], plain)


@torch.no_grad()
@pytest.mark.parametrize(("given", "scale"), [(0, 1.0), (2, 1.0), (3, 4.0)])
def test_a_clip_is_sampled_at_once_around_the_frames_that_are_given(
    tiny_backbone: Backbone, new_conditions: NewConditions, given: int, scale: float
) -> None:
    torch.manual_seed(6)
    model, conditions = tiny_backbone.model, new_conditions(2, FRAMES)
    prompt, bare = model.prompt(torch.randint(1, 257, (2, 12))), model.prompt(torch.zeros(2, 12, dtype=torch.int64))
    noise, true = torch.randn(2, FRAMES, 4, 4, 6), torch.randn(2, given, 4, 4, 6)
    got = sample_clip(model, noise, Guidance(prompt, bare, scale), conditions, LEVELS, true)
    x = torch.cat([true, noise[:, given:]], 1)
    for level, following in zip(LEVELS, [*LEVELS[1:], 0.0], strict=True):
        timesteps = torch.full((2, FRAMES), 1000 * level)
        timesteps[:, :given] = 0
        with_it, without = (model(x, timesteps, text, Full(FRAMES), conditions) for text in (prompt, bare))
        velocity = without + scale * (with_it - without)
        velocity[:, :given] = 0
        x = x + (following - level) * velocity
    torch.testing.assert_close(got, x, rtol=0, atol=1e-4)
    assert torch.equal(got[:, :given], true)


def test_what_cannot_be_sampled_is_refused(tiny_backbone: Backbone, new_conditions: NewConditions) -> None:
    prompt = tiny_backbone.model.prompt(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(InputError, match=r"guidance=3\.0: expected the bare prompt too"):
        Guidance(prompt, scale=3.0)
    clip = torch.randn(1, 2, 4, 4, 6)
    with pytest.raises(InputError, match="given: has 2 frames, expected fewer than the clip's 2"):
        sample_clip(tiny_backbone.model, clip, Guidance(prompt), new_conditions(1, 2), LEVELS, clip)
