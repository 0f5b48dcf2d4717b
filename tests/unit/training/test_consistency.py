"""Stage 3: the loss, term by term, from what teacher, target and student were asked and answered."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minwm.diffusion.flow import schedule
from minwm.models.backbones import Backbone, load_backbone
from minwm.training.batch import Batch
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.draw import Draw

pytestmark = pytest.mark.unit

Record = Callable[[nn.Module], list[Any]]


def make(backbone: Backbone, *, seed: int = 9, **config: float) -> Consistency:
    """A stage whose three networks differ, as after some steps of training."""
    stage = Consistency(ConsistencyConfig(**config), backbone)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    with torch.no_grad():
        for network in (*stage.frozen.values(), *stage.fixed.values()):
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return stage


@pytest.mark.parametrize("intervals", [1, 4, 50])
def test_loss_compares_the_student_with_the_target_one_teacher_step_further_down(
    tiny_backbone: Backbone, batch: Batch, record: Record, intervals: int
) -> None:
    stage = make(tiny_backbone, intervals=intervals)
    student, (teacher, target) = tiny_backbone.model, (stage.fixed["teacher"], stage.frozen["target"])
    mine, theirs, slow = record(student), record(teacher), record(target)
    levels = [*schedule(intervals, 3.0), 0.0]
    loss, _ = stage.loss("generator", batch, Draw(0, 0, range(3)))
    for calls in (mine, theirs, slow):
        assert len(calls) == 1
        assert torch.equal(calls[0].latents[:, :8], batch.latents), "history is clean"
        assert torch.equal(calls[0].timesteps[:, :8], torch.zeros(3, 8))
    noisy, further = theirs[0].latents[:, 8:], slow[0].latents[:, 8:]
    assert torch.equal(mine[0].latents[:, 8:], noisy)
    sigma, following = theirs[0].sigma[:, 8:], slow[0].sigma[:, 8:]
    for here, there in zip(sigma.reshape(-1, 2), following.reshape(-1, 2), strict=True):
        place = min(range(intervals), key=lambda i: abs(levels[i] - float(here[0])))
        torch.testing.assert_close(here, torch.full((2,), levels[place]), rtol=0, atol=1e-6)
        torch.testing.assert_close(there, torch.full((2,), levels[place + 1]), rtol=0, atol=1e-6)
    if intervals == 50:
        assert len(sigma.unique()) > 6, "each chunk has an interval of its own"
    torch.testing.assert_close(further, noisy + (following - sigma) * theirs[0].output[:, 8:], rtol=0, atol=1e-4)
    goal = further - following * slow[0].output[:, 8:]
    expected = (noisy - sigma * mine[0].output[:, 8:] - goal).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)


def test_every_interval_is_drawn_the_last_one_too(tiny_backbone: Backbone, batch: Batch, record: Record) -> None:
    stage = make(tiny_backbone, intervals=3)
    calls = record(stage.frozen["target"])
    with torch.no_grad():
        for step in range(12):
            stage.loss("generator", batch, Draw(0, step, range(3)))
    drawn = {round(float(t), 2) for call in calls for t in call.timesteps[:, -1]}
    assert drawn == {round(1000 * level, 2) for level in [*schedule(3, 3.0)[1:], 0.0]}


def test_levels_stay_float32_under_bf16_autocast(tiny_backbone: Backbone, batch: Batch, record: Record) -> None:
    stage = make(tiny_backbone, intervals=1000)
    theirs, slow = record(stage.fixed["teacher"]), record(stage.frozen["target"])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = stage.loss("generator", batch, Draw(0, 0, range(3)))
    assert loss.dtype == torch.float32
    for call in (theirs[0], slow[0]):
        assert call.timesteps.dtype == torch.float32
        assert call.latents.dtype == torch.float32
    levels = torch.tensor([*schedule(1000, 3.0), 0.0], dtype=torch.float64) * 1000
    for here, there in zip(theirs[0].timesteps[:, -1].double(), slow[0].timesteps[:, -1].double(), strict=True):
        place = int((levels - here).abs().argmin())
        torch.testing.assert_close(there, levels[place + 1], rtol=0, atol=1e-3)
    step = slow[0].latents[:, 8:] - theirs[0].latents[:, 8:]
    expected = (slow[0].sigma - theirs[0].sigma)[:, 8:] * theirs[0].output[:, 8:].float()
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6)


def test_only_the_student_gets_gradients(tiny_backbone: Backbone, batch: Batch, draw: Draw) -> None:
    stage = make(tiny_backbone)
    loss, _ = stage.loss("generator", batch, draw)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in tiny_backbone.model.parameters())
    assert all(
        parameter.grad is None
        for network in (*stage.frozen.values(), *stage.fixed.values())
        for parameter in network.parameters()
    )


def test_guidance_moves_the_teacher_away_from_what_it_says_without_a_prompt(
    tiny_backbone: Backbone, batch: Batch, record: Record
) -> None:
    stage = make(tiny_backbone, guidance=2.5, intervals=2)
    theirs, slow = record(stage.fixed["teacher"]), record(stage.frozen["target"])
    stage.loss("generator", batch, Draw(0, 0, range(3)))
    prompted, bare = theirs
    nothing = stage.fixed["teacher"].prompt(torch.zeros_like(batch.text))
    assert torch.equal(bare.prompt.layers[0][0], nothing.layers[0][0])
    velocity = (bare.output + 2.5 * (prompted.output - bare.output))[:, 8:]
    sigma, following = prompted.sigma[:, 8:], slow[0].sigma[:, 8:]
    expected = prompted.latents[:, 8:] + (following - sigma) * velocity
    torch.testing.assert_close(slow[0].latents[:, 8:], expected, rtol=0, atol=1e-4)


def test_the_target_follows_the_student_slowly_and_is_what_is_exported(tiny_backbone: Backbone, tmp_path: Path) -> None:
    stage = make(tiny_backbone, ema_decay=0.9)
    target, student = stage.frozen["target"], tiny_backbone.model
    expected = {
        name: 0.9 * slow + 0.1 * dict(student.named_parameters())[name]
        for name, slow in ((name, value.clone()) for name, value in target.named_parameters())
    }
    teacher = [parameter.clone() for parameter in stage.fixed["teacher"].parameters()]
    stage.after_step(0)
    for name, value in target.named_parameters():
        torch.testing.assert_close(value, expected[name])
    assert all(torch.equal(a, b) for a, b in zip(teacher, stage.fixed["teacher"].parameters(), strict=True))
    stage.export(tmp_path / "model", {})
    exported = load_backbone(tmp_path / "model").model.state_dict()
    for name, value in target.state_dict().items():
        assert torch.equal(exported[name], value.bfloat16().float()), name
