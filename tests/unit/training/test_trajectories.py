"""The teacher's trajectories: what is sampled, what is written, and that it can be made again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from minwm.data.clips import KIND as CLIPS
from minwm.data.clips import Clip
from minwm.data.shards import ShardWriter
from minwm.diffusion.flow import schedule
from minwm.errors import ConfigError, DataError
from minwm.models.backbones import Backbone, load_backbone, save_backbone
from minwm.models.context import teacher_forcing
from minwm.training.autoregressive import denoise_given_clean
from minwm.training.batch import WindowConfig, cut_windows
from minwm.training.draw import Draw
from minwm.training.recipe import load_recipe, load_trajectories_recipe, run_recipe, run_trajectories
from minwm.training.trajectories import SamplingConfig, Trajectory, load_trajectories, write_trajectories

pytestmark = pytest.mark.unit

NewClips = Callable[[int, int], list[Clip]]
WINDOW = WindowConfig(frames=4, prompt_dropout=0.0)


def sampling(**changes: Any) -> SamplingConfig:
    return SamplingConfig(**{"window": WINDOW, "windows": 3, "steps": (2, 1), "ode_steps": 4, **changes})


@torch.no_grad()
def test_states_are_those_of_the_guided_ode_under_the_mask_given_true_history(
    tmp_path: Path, tiny_backbone: Backbone, new_clips: NewClips
) -> None:
    """By brute force, at every level: the states at 2 and 1 steps, the end point, and the true window."""
    clips, config = new_clips(2, 6), sampling(guidance=2.0, steps=(4, 2, 1), ode_steps=8)
    write_trajectories(tiny_backbone, clips, config, tmp_path / "out", {})
    found = load_trajectories(tmp_path / "out")
    assert found.levels == {count: tuple(schedule(count, 3.0)) for count in (1, 2, 4)}
    assert found.states == pytest.approx(schedule(4, 3.0))
    assert found.history == tiny_backbone.config.history

    draw = Draw(0, 0, range(3))
    batch = cut_windows([clips[0], clips[1], clips[0]], draw, WINDOW, tiny_backbone.encode)
    model, context = tiny_backbone.model, teacher_forcing(4, tiny_backbone.config.history)
    prompt, bare = model.prompt(batch.text), model.prompt(tiny_backbone.encode(["", "", ""]))
    grid = schedule(8, 3.0)
    x, states = draw.normal("trajectory", (4, 4, 4, 6)), []
    for level, following in zip(grid, [*grid[1:], 0.0], strict=True):
        states.append(x)
        sigma = torch.full((3, 4), level)
        with_it, without = (
            denoise_given_clean(model, x, batch.latents, sigma, text, batch.conditions, context)
            for text in (prompt, bare)
        )
        x = x + (following - level) * (without + 2.0 * (with_it - without))
    expected = torch.stack([*states[::2], x], 1)
    for i, trajectory in enumerate(found.samples):
        assert trajectory.states.dtype == np.float16
        got = torch.from_numpy(trajectory.states).float()
        torch.testing.assert_close(got, expected[i], rtol=2e-3, atol=2e-3, msg=lambda m, i=i: f"window {i}: {m}")
        assert torch.equal(torch.from_numpy(trajectory.clean).float(), batch.latents[i])
        assert trajectory.caption == clips[i % 2].caption
        cameras = batch.conditions.cameras
        assert cameras is not None and batch.conditions.actions is not None
        np.testing.assert_array_equal(trajectory.viewmats, cameras.viewmats[i])
        np.testing.assert_array_equal(trajectory.motions, cameras.motions[i])
        np.testing.assert_array_equal(trajectory.intrinsics, cameras.intrinsics[i])
        np.testing.assert_array_equal(trajectory.actions, batch.conditions.actions[i])


def test_the_same_recipe_writes_the_same_shards_and_another_batch_size_the_same_windows(
    tmp_path: Path, tiny_backbone: Backbone, new_clips: NewClips
) -> None:
    clips = new_clips(2, 6)
    digests = [
        write_trajectories(tiny_backbone, clips, sampling(), tmp_path / name, {}).digest() for name in ("a", "b")
    ]
    assert digests[0] == digests[1]
    write_trajectories(tiny_backbone, clips, sampling(batch_size=1), tmp_path / "one", {})
    pairs = zip(load_trajectories(tmp_path / "a").samples, load_trajectories(tmp_path / "one").samples, strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one.states[0], other.states[0])
        np.testing.assert_allclose(one.states, other.states, atol=4e-3)


def test_a_dropped_caption_is_dropped_for_the_student_too(
    tmp_path: Path, tiny_backbone: Backbone, new_clips: NewClips
) -> None:
    config = sampling(window=replace(WINDOW, prompt_dropout=1.0, image_dropout=1.0))
    write_trajectories(tiny_backbone, new_clips(1, 6), config, tmp_path / "out", {})
    assert {(t.caption, t.image) for t in load_trajectories(tmp_path / "out").samples} == {("", False)}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"ode_steps": 6, "steps": (4,)}, r"ode_steps=6: expected a multiple of each of steps=\[4\]"),
        ({"windows": 0}, "windows=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"steps": ()}, r"steps=\[\]"),
    ],
)
def test_an_impossible_sampling_is_refused(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        sampling(**wrong)


def test_levels_that_the_teacher_does_not_pass_are_refused(
    tmp_path: Path, tiny_backbone: Backbone, new_clips: NewClips
) -> None:
    odd = replace(tiny_backbone, config=replace(tiny_backbone.config, levels={1: (0.97,)}))
    with pytest.raises(ConfigError, match=r"steps: level 0\.97 is not among those of 4 steps with shift 3\.0"):
        write_trajectories(odd, new_clips(1, 6), sampling(steps=(1,)), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_a_damaged_trajectory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trajectory window-1: lacks the file states\.npy"):
        Trajectory.from_files("window-1", {"json": b"{}"})
    with ShardWriter(tmp_path / "foreign", "trajectories") as writer:
        writer.add("a", {"json": b"{}"})
    with pytest.raises(DataError, match="its manifest does not say how it was sampled"):
        load_trajectories(tmp_path / "foreign")


def test_from_recipe_to_student(tmp_path: Path, tiny_backbone: Backbone, new_clips: NewClips) -> None:
    """`minwm trajectories` and the stage `ode`, frame by frame, as a user runs them."""
    with ShardWriter(tmp_path / "clips", CLIPS) as writer:
        for clip in new_clips(2, 5):
            writer.add(clip.name, clip.to_files())
    save_backbone(tmp_path / "teacher", tiny_backbone, {})
    common = {"backbone": str(tmp_path / "teacher"), "history": {"chunk": 1, "window": 3}}
    recipe = tmp_path / "recipe.yaml"
    method = {"windows": 2, "window": {"frames": 3}, "ode_steps": 2, "steps": [2, 1]}
    recipe.write_text(yaml.safe_dump({**common, "data": str(tmp_path / "clips"), "sampling": method}))
    run_trajectories(load_trajectories_recipe(recipe), tmp_path / "trajectories")
    train = {"stage": "ode", "run": {"steps": 2, "batch_size": 2, "engine": "torch"}, "optimizers": {"generator": {}}}
    recipe.write_text(yaml.safe_dump({**common, **train, "data": str(tmp_path / "trajectories")}))
    student = load_backbone(run_recipe(load_recipe(recipe), tmp_path / "run"))
    assert (student.config.history.chunk, student.config.history.window) == (1, 3)
    assert list(student.config.levels) == [1, 2]
    with pytest.raises(ConfigError, match=r"history: the student's is .*chunk=2.*, expected .*chunk=1"):
        run_recipe(load_recipe(recipe, ["history={chunk: 2, window: 4}"]), tmp_path / "other")
