"""Activation checkpointing: the same gradients from less memory, in every context."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import Full, History, teacher_forcing
from minwm.models.rollout import ChunkRollout

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
NewConditions = Callable[[int, int], Conditions]
NewText = Callable[..., Any]

Loss = Callable[[Backbone, Any, Conditions], Tensor]
CAMERAS_AND_ACTIONS = ("camera_prope", "action_attention")


def one_pass(backbone: Backbone, text: Any, conditions: Conditions, *, bidirectional: bool) -> Tensor:
    """A whole clip of eight frames."""
    context = Full(8) if bidirectional else teacher_forcing(4, backbone.config.history)
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 4, 4, 6, generator=random)
    timesteps = 1000 * torch.rand(2, 8, generator=random)
    prompt = backbone.model.prompt(text, bidirectional=bidirectional)
    return backbone.model(latents, timesteps, prompt, context, conditions).square().mean()  # type: ignore[no-any-return]


def rolled_out(backbone: Backbone, text: Any, conditions: Conditions) -> Tensor:
    """Four chunks from a cache of two, so that what the first ones saw is gone when the gradient comes back."""
    model, history = backbone.model, backbone.config.history
    noise = torch.randn(3, 2, 8, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    rollout = ChunkRollout(model, history, (4, 4, 6), batch=2)
    prompt, chunks = model.prompt(text), []
    for start in range(0, 8, history.chunk):
        seen, place = conditions.frames(start, start + history.chunk), slice(start, start + history.chunk)
        renoise = lambda step, place=place: noise[step + 1][:, place]  # noqa: E731
        chunk = rollout.denoise(noise[0][:, place], prompt, seen, (1.0, 0.7), renoise, exit_step=1)
        rollout.commit(chunk.detach(), prompt.detach(), seen)
        chunks.append(chunk)
    return torch.cat(chunks, 1).square().mean()


LOSSES: dict[str, Loss] = {
    "bidirectional": lambda *of: one_pass(*of, bidirectional=True),
    "teacher-forced": lambda *of: one_pass(*of, bidirectional=False),
    "rolled out from the cache": rolled_out,
}


def gradients(backbone: Backbone, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*backbone.model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_gradients_are_the_same_with_activations_made_again(
    kind: str, loss: Loss, new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText
) -> None:
    backbone = new_backbone(History(chunk=2, window=3, sink=1), kind=kind, conditions=CAMERAS_AND_ACTIONS)
    text, conditions = new_text(backbone.config.architecture, 2), new_conditions(2, 8)
    plain = loss(backbone, text, conditions)
    expected = gradients(backbone, plain)
    backbone.model.checkpoint_activations = True
    again = loss(backbone, text, conditions)
    assert torch.equal(again, plain)
    found = gradients(backbone, again)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=f"the gradient of {name}")


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_what_is_kept_for_the_gradient_grows_by_a_block_s_input_a_layer(
    kind: str, new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText
) -> None:
    def kept(layers: int, *, checkpointed: bool) -> int:
        """Bytes of activations."""
        backbone = new_backbone(kind=kind, layers=layers)
        backbone.model.checkpoint_activations = checkpointed
        weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.model.parameters()}
        stored: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                stored[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        text = new_text(backbone.config.architecture, 2)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            one_pass(backbone, text, new_conditions(2, 8), bidirectional=False)
        return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())

    per_layer = {on: kept(3, checkpointed=on) - kept(2, checkpointed=on) for on in (False, True)}
    assert per_layer[True] < per_layer[False] / 5, f"bytes a layer, by checkpointing: {per_layer}"


def test_without_gradient_nothing_is_checkpointed(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText
) -> None:
    backbone = new_backbone()
    text, conditions = new_text(backbone.config.architecture, 2), new_conditions(2, 8)
    with torch.no_grad():
        plain = rolled_out(backbone, text, conditions)
        backbone.model.checkpoint_activations = True
        assert torch.equal(rolled_out(backbone, text, conditions), plain)
