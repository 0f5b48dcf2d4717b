"""A fused model is the model it was made of."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from minwm.errors import ConfigError
from minwm.models.backbones import Backbone
from minwm.models.combined import join_conditions, together
from minwm.models.conditions import Conditions
from minwm.models.context import Context, Full, History, teacher_forcing
from minwm.models.fused import FusedBlock, fuse
from minwm.models.prope import Cameras
from minwm.models.rollout import ChunkRollout
from minwm.models.transformer import Transformer
from tests.conftest import random_text

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
SHAPE = 4, 4, 6


def _cameras(frames: int, seed: int) -> Conditions:
    random = torch.Generator().manual_seed(seed)
    viewmats = torch.eye(4).repeat(1, frames, 1, 1)
    viewmats[..., :3, :3] = torch.linalg.qr(torch.randn(1, frames, 3, 3, generator=random))[0]
    viewmats[..., :3, 3] = 2 * torch.randn(1, frames, 3, generator=random)
    return Conditions(cameras=Cameras.track(viewmats, torch.tensor([[0.5, 0.7, 0.5, 0.5]])))


def _prompt(backbone: Backbone, model: Transformer) -> object:
    return model.prompt(random_text(backbone.config.architecture, 1))


@pytest.mark.parametrize("conditions", [(), ("camera_prope",), ("camera_prope", "action_timestep")])
@torch.no_grad()
def test_it_gives_the_same_velocities_in_every_context(new_backbone: NewBackbone, conditions: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    backbone = new_backbone(conditions=conditions)
    model, fused = backbone.model, fuse(backbone.model)
    assert any(isinstance(block, FusedBlock) for block in fused.modules())
    given = _cameras(4, 1)
    if "action_timestep" in conditions:
        given = Conditions(cameras=given.cameras, actions=torch.randint(0, 81, (1, 4)))
    contexts: list[Context] = [Full(4), teacher_forcing(2, backbone.config.history)]
    for context in contexts:
        latents, timesteps = torch.randn(1, 4, *SHAPE), 1000 * torch.rand(1, 4)
        expected = model(latents, timesteps, _prompt(backbone, model), context, given)
        got = fused(latents, timesteps, _prompt(backbone, fused), context, given)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rollouts_of_several_worlds_past_their_sinks_go_the_same_way(new_backbone: NewBackbone) -> None:
    torch.manual_seed(0)
    backbone = new_backbone(history=History(chunk=2, window=4, sink=2))
    chunks = [[torch.randn(1, 2, *SHAPE) for _ in range(5)] for _ in range(2)]

    def velocity(model: Transformer) -> Tensor:
        rollouts, prompt = (
            [ChunkRollout(model, backbone.config.history, SHAPE) for _ in chunks],
            _prompt(backbone, model),
        )
        for number in range(5):
            for seed, (rollout, own) in enumerate(zip(rollouts, chunks, strict=True)):
                rollout.commit(own[number], prompt, _cameras(2, 10 * seed + number))  # type: ignore[arg-type]
        steering = [_cameras(2, 100 + seed) for seed in range(2)]
        contexts = [rollout.context(own) for rollout, own in zip(rollouts, steering, strict=True)]
        text = model.prompt(random_text(backbone.config.architecture, 1).expand(2, -1))
        noise = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(3))
        return model(noise, torch.full((2, 2), 700.0), text, together(contexts), join_conditions(steering))

    fused = fuse(backbone.model)
    torch.testing.assert_close(velocity(fused), velocity(backbone.model), rtol=1e-4, atol=1e-5)


def test_it_is_a_copy_that_leaves_the_model_alone(new_backbone: NewBackbone) -> None:
    model = new_backbone().model
    fused = fuse(model)
    assert not any(isinstance(module, FusedBlock) for module in model.modules())
    with torch.no_grad():
        for block in cast(nn.ModuleList, model.blocks):
            block.self_attn.q.weight.zero_()  # type: ignore[union-attr,operator]
    assert all(block.qkv.weight.any(dim=1).all() for block in cast(nn.ModuleList, fused.blocks))  # type: ignore[union-attr]


def test_a_model_that_is_no_wan_stays_as_it_is(new_backbone: NewBackbone) -> None:
    model = new_backbone(kind="hunyuan").model
    assert fuse(model) is model
    with pytest.raises(ConfigError, match="eight bits: Hunyuan, expected a Wan"):
        fuse(model, eight_bit=True)


@torch.no_grad()
def test_products_of_eight_bits_are_a_few_percent_off(new_backbone: NewBackbone) -> None:
    torch.manual_seed(0)
    backbone = new_backbone()
    latents, timesteps = torch.randn(1, 4, *SHAPE), 1000 * torch.rand(1, 4)
    exact, rounded = (
        model(latents, timesteps, _prompt(backbone, model), Full(4), _cameras(4, 2))
        for model in (backbone.model, fuse(backbone.model, eight_bit=True))
    )
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
