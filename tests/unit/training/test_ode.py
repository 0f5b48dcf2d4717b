"""Stage 3a: the loss, read off what the student was asked and answered, and worked by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minwm.data.clips import Clip
from minwm.models.backbones import Backbone
from minwm.training.batch import WindowConfig
from minwm.training.draw import Draw
from minwm.training.ode import Ode, OdeConfig
from minwm.training.trajectories import SamplingConfig, Trajectory, TrajectorySet, load_trajectories, write_trajectories

pytestmark = pytest.mark.unit

Record = Callable[[nn.Module], list[Any]]


@pytest.fixture
def trajectories(tmp_path: Path, tiny_backbone: Backbone, new_clips: Callable[[int, int], list[Clip]]) -> TrajectorySet:
    """Three trajectories of 6 frames, with states at the levels of 4, 2 and 1 steps."""
    config = SamplingConfig(window=WindowConfig(frames=6), windows=3, steps=(4, 2, 1), ode_steps=4)
    write_trajectories(tiny_backbone, new_clips(3, 8), config, tmp_path / "set", {})
    return load_trajectories(tmp_path / "set")


def test_loss_is_the_end_point_s_error_from_the_state_at_each_chunk_s_own_level(
    tiny_backbone: Backbone, trajectories: TrajectorySet, record: Record
) -> None:
    stage, calls = Ode(OdeConfig(), tiny_backbone, trajectories), record(tiny_backbone.model)
    visited = set()
    for step in range(6):
        draw = Draw(0, step, range(3))
        loss, _ = stage.loss("generator", stage.prepare(trajectories.samples, draw), draw)
        call = calls[-1]
        errors = []
        for b, trajectory in enumerate(trajectories.samples):
            states, clean = (torch.from_numpy(part).float() for part in (trajectory.states, trajectory.clean))
            assert torch.equal(call.latents[b, :6], clean), "history is clean"
            assert not call.timesteps[b, :6].any()
            for f in range(6):
                told = float(call.timesteps[b, 6 + f]) / 1000
                place = min(range(4), key=lambda i: abs(trajectories.states[i] - told))
                assert told == pytest.approx(trajectories.states[place], abs=1e-6)
                assert told == pytest.approx(float(call.timesteps[b, 6 + f - f % 2]) / 1000), "a chunk has one level"
                visited.add(place)
                assert torch.equal(call.latents[b, 6 + f], states[place, f])
                errors.append((states[place, f] - told * call.output[b, 6 + f] - states[-1, f]).square().mean())
        torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
        assert len(call.timesteps[:, 6:].unique()) > 1
    assert visited == {0, 1, 2, 3}, "every level is asked, the last one too"


def test_a_student_that_knows_the_answer_loses_nothing_and_one_that_is_off_by_d_loses_sigma_d_squared(
    tiny_backbone: Backbone, trajectories: TrajectorySet
) -> None:
    """Straight trajectories x_σ = e + σ·v: velocity v is the answer; v + d misses the end point by σ·d."""

    class Off(nn.Module):
        def forward(self, latents: torch.Tensor, *_: Any) -> torch.Tensor:
            return torch.full_like(latents, 0.5 + self.by)

        def prompt(self, text: Any) -> None:
            return None

        by = 0.0

    def straight(trajectory: Trajectory) -> Trajectory:
        end = trajectory.states[-1].astype(np.float64)
        states = np.stack([end + 0.5 * sigma for sigma in (*trajectories.states, 0.0)])
        return Trajectory(**{**trajectory.__dict__, "states": states})

    model = Off()
    stage = Ode(OdeConfig(), Backbone(model, tiny_backbone.config, tiny_backbone.encode), trajectories)  # type: ignore[arg-type]
    draw = Draw(0, 0, range(3))
    batch = stage.prepare([straight(trajectory) for trajectory in trajectories.samples], draw)
    assert float(stage.loss("generator", batch, draw)[0]) == pytest.approx(0, abs=1e-10)
    model.by = 0.25
    index = draw.integer("level", 4, (3,))
    expected = (0.25 * torch.tensor(trajectories.states)[index]).square().mean()
    torch.testing.assert_close(stage.loss("generator", batch, draw)[0], expected, rtol=1e-4, atol=1e-7)


def test_a_step_brings_the_student_nearer_to_the_end_points(
    tiny_backbone: Backbone, trajectories: TrajectorySet
) -> None:
    stage, draw = Ode(OdeConfig(), tiny_backbone, trajectories), Draw(0, 0, range(3))
    batch = stage.prepare(trajectories.samples, draw)
    optimizer = torch.optim.SGD(tiny_backbone.model.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        loss, _ = stage.loss("generator", batch, draw)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[1] < losses[0]
