from dataclasses import replace

import numpy as np
import pytest
import torch

from minwm.errors import ConfigError
from minwm.evaluation.rollouts import Sampling, compare, few_steps, many_steps, roll_out
from minwm.evaluation.walks import along_clip
from minwm.geometry.camera import relative_viewmats
from minwm.models.conditions import Conditions
from minwm.models.context import Masked, teacher_forcing
from minwm.models.prope import Cameras
from minwm.models.worlds import World
from minwm.randomness import generator

from .conftest import HEIGHT, WIDTH, MakeClip

pytestmark = pytest.mark.unit


def test_a_rollout_has_eight_frames_for_every_chunk_and_depends_on_the_seed_alone(
    world: World, make_clip: MakeClip
) -> None:
    frames = roll_out(world, along_clip(world, make_clip(0), 3), seed=1)
    assert frames.shape == (24, HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, roll_out(world, along_clip(world, make_clip(0), 3), seed=1))
    assert not np.array_equal(frames, roll_out(world, along_clip(world, make_clip(0), 3), seed=2))


def test_a_longer_rollout_begins_with_the_shorter_one(world: World, make_clip: MakeClip) -> None:
    long, short = (roll_out(world, along_clip(world, make_clip(0), chunks), seed=1).astype(int) for chunks in (4, 2))
    assert np.abs(long[: len(short)] - short).max() <= 1  # rounding: convolutions over another number of frames


def test_a_rollout_follows_the_clips_path_and_no_later_frame(world: World, make_clip: MakeClip) -> None:
    clip, other = make_clip(0), make_clip(1)
    frames = roll_out(world, along_clip(world, clip, 3), seed=1)
    assert not np.array_equal(frames, roll_out(world, along_clip(world, replace(clip, poses=other.poses), 3), seed=1))
    later = np.concatenate([clip.latents[:2], other.latents[2:]])
    assert np.array_equal(frames, roll_out(world, along_clip(world, replace(clip, latents=later), 3), seed=1))
    given = np.concatenate([other.latents[:2], clip.latents[2:]])
    assert not np.array_equal(frames, roll_out(world, along_clip(world, replace(clip, latents=given), 3), seed=1))


def test_a_rollout_in_an_offered_number_of_steps(world: World, make_clip: MakeClip) -> None:
    walk = along_clip(world, make_clip(0), 1)
    one, two = (roll_out(world, walk, seed=1, sampling=few_steps(world, steps)) for steps in (1, 2))
    assert len(one) == len(two) == 8 and not np.array_equal(one, two)
    assert np.array_equal(two, roll_out(world, walk, seed=1)), "two steps are the world's own number"
    with pytest.raises(ConfigError, match="steps=3"):
        few_steps(world, 3)


@pytest.mark.parametrize("guidance", [1.0, 20.0])
def test_a_teacher_follows_the_ode_with_guidance_if_asked_and_needs_no_fresh_noise(
    world: World, make_clip: MakeClip, guidance: float
) -> None:
    """By brute force: passes over all frames under the mask, with the prompt and without."""
    walk, config = along_clip(world, make_clip(0), 1), world.backbone.config
    sampling = many_steps(config, 3, guidance)
    assert sampling.levels == pytest.approx([1.0, 6 / 7, 0.6])  # of 1, 2/3, 1/3 with the config's shift, 3
    frames = roll_out(world, walk, seed=1, sampling=sampling)
    model, given = world.backbone.model, torch.from_numpy(walk.given)[None].float()
    viewmats = torch.from_numpy(relative_viewmats(walk.poses))[None]
    cameras = Cameras.track(viewmats, torch.from_numpy(walk.intrinsics)[None])
    x = torch.randn(given.shape, generator=generator(1, walk.name, 2, -1))
    context = Masked(range(4), teacher_forcing(4, config.history).mask[:4, :4])
    for level, following in ((1.0, 6 / 7), (6 / 7, 0.6), (0.6, 0.0)):
        timesteps = 1000 * torch.tensor([[0.0, 0.0, level, level]])
        with torch.inference_mode():
            prompts = [model.prompt(world.backbone.encode([text])) for text in (walk.caption, "")]
            both, given_cameras = torch.cat([given, x], dim=1), Conditions(cameras=cameras)
            prompted, bare = (model(both, timesteps, prompt, context, given_cameras) for prompt in prompts)
        velocity = bare + guidance * (prompted - bare)
        x = x + (following - level) * velocity[:, 2:]
    expected, _ = world.autoencoder.decode(torch.cat([given, x], dim=1))
    expected = (expected[0, 8:].clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(frames.astype(float) - expected).max() <= 1
    if guidance != 1:
        plain = roll_out(world, walk, seed=1, sampling=many_steps(config, 3))
        assert np.abs(frames.astype(float) - plain).max() > 1, "guidance makes no difference here"


def test_few_steps_take_no_guidance() -> None:
    with pytest.raises(ConfigError, match=r"guidance=2\.0: expected 1 where few steps"):
        Sampling((1.0, 0.5), guidance=2.0)


def test_a_comparison_has_the_true_frames_and_both_baselines(world: World, make_clip: MakeClip) -> None:
    clip = make_clip(0)
    compared = compare(world, clip, chunks=2, seed=0)
    video = clip.video()
    decoded = world.autoencoder.decode(torch.from_numpy(clip.latents[None, :6]).float())[0][0]
    decoded = (decoded.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for frame in range(16):
        true = video[8 + frame]
        assert np.array_equal(compared.others["repeat_last"][frame], video[7])
        assert np.array_equal(compared.others["autoencoder"][frame], decoded[8 + frame])
        assert np.array_equal(compared.true[frame], true)
    assert np.array_equal(compared.given, video[:8])
    assert np.array_equal(compared.others["generated"], roll_out(world, along_clip(world, clip, 2), seed=0))
