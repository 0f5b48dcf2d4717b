"""Stage 2: the teacher-forced loss is what a cached rollout with true history would lose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from minwm.models.backbones import Backbone
from minwm.models.cache import KVCache
from minwm.models.context import History
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.batch import Batch
from minwm.training.draw import Draw
from minwm.training.levels import chunk_levels

pytestmark = pytest.mark.unit

Record = Callable[[nn.Module], list[Any]]


@pytest.mark.parametrize("history", [History(chunk=2, window=4), History(chunk=4, window=6, sink=1)], ids=str)
def test_loss_is_the_velocity_s_error_of_a_cached_rollout_on_the_true_past(
    new_backbone: Callable[[History], Backbone], batch: Batch, draw: Draw, record: Record, history: History
) -> None:
    backbone = new_backbone(history)
    model, calls = backbone.model, record(backbone.model)
    with torch.no_grad():
        loss, _ = Autoregressive(AutoregressiveConfig(), backbone).loss("generator", batch, draw)
    (call,) = calls
    clean, noisy = call.latents.split(8, 1)
    assert torch.equal(clean, batch.latents)
    assert torch.equal(call.timesteps[:, :8], torch.zeros(3, 8))

    cache = KVCache(model.architecture.cache_geometry(4, 6, history), 3, torch.float32)
    errors = []
    for start in range(0, 8, history.chunk):
        now = slice(start, start + history.chunk)
        context, conditions = cache.context(start, now.stop - start), batch.conditions.frames(start, now.stop)
        sigma = call.sigma[:, 8:][:, now]
        with torch.no_grad():
            predicted = model(noisy[:, now], call.timesteps[:, 8:][:, now], call.prompt, context, conditions)
            model(clean[:, now], torch.zeros(3, now.stop - start), call.prompt, context, conditions)
        errors.append((predicted - (noisy[:, now] - clean[:, now]) / sigma).square())
    torch.testing.assert_close(loss, torch.cat(errors, 1).mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("frames", "chunk", "chunks"), [(8, 2, 4), (9, 3, 3), (5, 1, 5), (4, 4, 1)])
def test_each_chunk_of_each_sample_has_a_level_of_its_own(frames: int, chunk: int, chunks: int) -> None:
    levels = chunk_levels(Draw(0, 0, range(50)), frames, chunk, 3.0)
    assert levels.shape == (50, frames)
    assert levels.dtype == torch.float32
    for start in range(0, frames, chunk):
        assert (levels[:, start : start + chunk] == levels[:, start : start + 1]).all()
    assert len(levels[:, ::chunk].unique()) == 50 * chunks


def test_levels_are_uniform_ones_moved_towards_noise_by_the_shift() -> None:
    levels = chunk_levels(Draw(0, 0, range(500)), 8, 2, 3.0).double()
    unwarped = levels / (3 - 2 * levels)  # solves σ' = 3σ / (1 + 2σ) for σ
    quantiles = torch.quantile(unwarped, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), rtol=0, atol=0.05)
