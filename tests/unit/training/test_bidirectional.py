"""Stage 1: every figure of the loss read off the network's own inputs and outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from minwm.errors import ConfigError
from minwm.models.backbones import Backbone
from minwm.models.context import Full
from minwm.training.batch import Batch, WindowConfig
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.draw import Draw
from minwm.training.levels import LevelsConfig

pytestmark = pytest.mark.unit

Record = Callable[[nn.Module], list[Any]]


def test_loss_is_the_velocity_s_error_over_the_noisy_frames_alone(
    tiny_backbone: Backbone, batch: Batch, draw: Draw, record: Record
) -> None:
    calls = record(tiny_backbone.model)
    loss, _ = Bidirectional(BidirectionalConfig(), tiny_backbone).loss("generator", batch, draw)
    (call,) = calls
    noisy = call.timesteps > 0
    assert 0 < noisy.sum() < 24, "some frames are given, some are not"
    clips = []
    for b in range(3):
        frames = [f for f in range(8) if noisy[b, f]]
        error = (call.output[b, f] - (call.latents[b, f] - batch.latents[b, f]) / call.sigma[b, f] for f in frames)
        clips.append(torch.stack([part.square().mean() for part in error]).mean())
    torch.testing.assert_close(loss, torch.stack(clips).mean(), rtol=1e-3, atol=1e-5)
    assert call.conditions is batch.conditions
    assert call.context == Full(8)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_given_share_of_clips_starts_with_up_to_half_of_its_frames_clean(
    tiny_backbone: Backbone, batch: Batch, record: Record, share: float
) -> None:
    calls = record(tiny_backbone.model)
    stage = Bidirectional(BidirectionalConfig(given_share=share), tiny_backbone)
    counts, levels = set(), set()
    with torch.no_grad():
        for step in range(12):
            stage.loss("generator", batch, Draw(0, step, range(3)))
    for call in calls:
        for b in range(3):
            given = int((call.timesteps[b] == 0).sum())
            counts.add(given)
            assert torch.equal(call.latents[b, :given], batch.latents[b, :given]), "given frames come first, clean"
            (level,) = call.timesteps[b, given:].unique().tolist()
            levels.add(level)
    assert counts == ({1, 2, 3, 4} if share else {0})
    assert len(levels) == 36, "each clip has its own level, which its noisy frames share"


def test_the_noise_is_standard_normal_whatever_the_level(
    tiny_backbone: Backbone, batch: Batch, draw: Draw, record: Record
) -> None:
    calls = record(tiny_backbone.model)
    Bidirectional(BidirectionalConfig(given_share=0), tiny_backbone).loss("generator", batch, draw)
    sigma = calls[0].sigma
    noise = (calls[0].latents - (1 - sigma) * batch.latents) / sigma
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_a_window_of_one_frame_cannot_be_given_a_past() -> None:
    with pytest.raises(ConfigError, match=r"window\.frames=1: expected at least 2 where given_share=0\.5"):
        BidirectionalConfig(window=WindowConfig(frames=1), given_share=0.5)
    BidirectionalConfig(window=WindowConfig(frames=1), given_share=0.0)


def test_weights_of_levels_count_in_the_loss(tiny_backbone: Backbone, batch: Batch, draw: Draw, record: Record) -> None:
    calls, levels = record(tiny_backbone.model), LevelsConfig(density="logit_normal", shift=2.0, weighting="bell")
    stage = Bidirectional(BidirectionalConfig(given_share=0, levels=levels), tiny_backbone)
    loss, _ = stage.loss("generator", batch, draw)
    (call,) = calls
    error = call.output - (call.latents - batch.latents) / call.sigma
    expected = (levels.weight(call.sigma, 3.0) * error.square()).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    u = draw.normal("level", ()).sigmoid()
    torch.testing.assert_close(call.sigma[:, 0, 0, 0, 0], 2 * u / (1 + u))
