"""Conditions: an exact no-op when new, heard when trained, refused when they do not fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minwm.errors import ConfigError, InputError
from minwm.geometry.actions import swap_sides
from minwm.models.backbones import Backbone, with_conditions
from minwm.models.conditions import ConditionName, Conditions, first_image, plucker_rays
from minwm.models.context import Full, History, teacher_forcing
from minwm.models.prope import Cameras

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
NewConditions = Callable[[int, int], Conditions]
NewText = Callable[..., Any]
KINDS = {"wan": get_args(ConditionName), "hunyuan": tuple(n for n in get_args(ConditionName) if n != "first_image")}
EACH = [(kind, name) for kind, names in KINDS.items() for name in names]


@torch.no_grad()
def forward(backbone: Backbone, conditions: Conditions, text: Any, *, bidirectional: bool = False) -> Tensor:
    """A pass over four random frames, teacher-forced or bidirectional, of two streams."""
    random = torch.Generator().manual_seed(5)
    context = Full(4) if bidirectional else teacher_forcing(4, History(chunk=2, window=4))
    frames = len(context.positions)
    latents, timesteps = torch.randn(2, frames, 4, 4, 6, generator=random), torch.rand(2, frames, generator=random)
    conditions = conditions.repeat_frames(frames // 4)
    prompt = backbone.model.prompt(text, bidirectional=bidirectional)
    out: Tensor = backbone.model(latents, 1000 * timesteps, prompt, context, conditions)
    return out


def randomise_new_parts(backbone: Backbone) -> None:
    """What starts at zero no longer does."""
    for parameter in backbone.model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("kind", "name"), EACH)
def test_a_new_condition_changes_nothing_until_it_is_trained(
    new_backbone: NewBackbone,
    new_conditions: NewConditions,
    new_text: NewText,
    kind: str,
    name: ConditionName,
    bidirectional: bool,
) -> None:
    plain, conditions = new_backbone(kind=kind, conditions=()), new_conditions(2, 4)
    text = new_text(plain.config.architecture, 2)
    before = forward(plain, conditions, text, bidirectional=bidirectional)
    steered = with_conditions(plain, [name], seed=0)
    after = forward(steered, conditions, text, bidirectional=bidirectional)
    if name == "camera_prope":  # one attention call over twice the heads sums in another order
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    else:
        assert torch.equal(after, before)
    randomise_new_parts(steered)
    trained = forward(steered, conditions, text, bidirectional=bidirectional)
    assert not torch.allclose(trained, before, atol=1e-3), "a trained branch is heard"


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_a_condition_can_be_learned_from_the_start(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText, kind: str, name: ConditionName
) -> None:
    """The zeros are where a gradient arrives: a branch whose other factor were zero too would never move."""
    steered = with_conditions(new_backbone(kind=kind, conditions=()), [name], seed=0)
    torch.manual_seed(0)
    prompt = steered.model.prompt(new_text(steered.config.architecture, 2), bidirectional=True)
    out = steered.model(torch.randn(2, 4, 4, 4, 6), torch.rand(2, 4) * 1000, prompt, Full(4), new_conditions(2, 4))
    out.square().sum().backward()
    fresh = [p for n, p in steered.model.named_parameters() if not p.any() and "bias" not in n]
    assert fresh
    assert all(p.grad is not None and p.grad.any() for p in fresh)


@pytest.mark.parametrize("kind", KINDS)
def test_changing_conditions_keeps_the_branches_that_stay(new_backbone: NewBackbone, kind: str) -> None:
    two = new_backbone(kind=kind, conditions=("camera_prope", "action_timestep"))
    other = with_conditions(two, ["action_timestep", "camera_plucker"], seed=1)
    kept, lost = two.model.state_dict(), other.model.state_dict()
    assert other.config.architecture.conditions == ("action_timestep", "camera_plucker")
    assert not [name for name in lost if "prope" in name]
    for name in kept.keys() & lost.keys():
        assert torch.equal(kept[name], lost[name]), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("camera_plucker", lambda c: replace(c, cameras=shifted(c.cameras))),
        ("camera_attention", lambda c: replace(c, cameras=shifted(c.cameras))),
        ("action_attention", lambda c: replace(c, actions=changed(c.actions))),
        ("action_timestep", lambda c: replace(c, actions=changed(c.actions))),
    ],
)
def test_a_frame_s_signal_is_its_own(
    new_backbone: NewBackbone,
    new_conditions: NewConditions,
    new_text: NewText,
    name: ConditionName,
    change: Callable[[Conditions], Conditions],
) -> None:
    """What is said of the last chunk is not heard in an earlier one."""
    backbone, conditions = new_backbone(conditions=(name,)), new_conditions(2, 4)
    text = new_text(backbone.config.architecture, 2)
    before, after = (forward(backbone, c, text)[:, 4:] for c in (conditions, change(conditions)))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:], atol=1e-3)


def shifted(cameras: Cameras) -> Cameras:
    motions = cameras.motions.clone()
    motions[:, 3, 0, 3] += 1
    return replace(cameras, motions=motions)


def changed(actions: Tensor) -> Tensor:
    actions = actions.clone()
    actions[:, 3] = (actions[:, 3] + 1) % 81
    return actions


@pytest.mark.parametrize("kind", KINDS)
def test_streams_without_a_first_image_are_what_they_are_without_the_signal(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText, kind: str
) -> None:
    backbone = new_backbone(kind=kind, conditions=("first_image",) if kind == "wan" else ())
    conditions, text = new_conditions(2, 4), new_text(backbone.config.architecture, 2)
    assert conditions.image is not None
    half = conditions.image * torch.tensor([1.0, 0.0])[:, None, None, None]
    mixed = forward(backbone, replace(conditions, image=half), text)
    torch.testing.assert_close(mixed[0], forward(backbone, conditions, text)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], forward(backbone, replace(conditions, image=None), text)[1], rtol=0, atol=1e-5)
    assert not torch.allclose(mixed[1], forward(backbone, conditions, text)[1], atol=1e-3)


@given(seed=st.integers(0, 1000))
def test_plucker_rays_are_moments_and_directions_through_the_pixels(seed: int) -> None:
    """Against points on each ray, in float64: the ray of a pixel passes through what projects onto that pixel."""
    random = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = turn * np.sign(np.linalg.det(turn)), random.normal(size=3)
    fx, fy, cx, cy = intrinsics = random.uniform(0.3, 1.2, 4)
    cameras = Cameras(
        torch.eye(4)[None, None], torch.tensor(intrinsics)[None].float(), torch.tensor(motion)[None, None].float()
    )
    rays = plucker_rays(cameras, 3, 5)[0, 0].double()
    for row in range(3):
        for column in range(5):
            depth = random.uniform(0.5, 4)
            u, v = (column + 0.5) / 5, (row + 0.5) / 3
            point = motion @ [depth * (u - cx) / fx, depth * (v - cy) / fy, depth, 1]
            moment, direction = rays[:3, row, column].numpy(), rays[3:, row, column].numpy()
            np.testing.assert_allclose(np.linalg.norm(direction), 1, atol=1e-5)
            np.testing.assert_allclose(np.cross(point[:3], direction), moment, atol=1e-4)
            np.testing.assert_allclose(np.cross(motion[:3, 3], direction), moment, atol=1e-4)


@pytest.mark.parametrize("name", ["action_timestep", "action_attention"])
def test_released_weights_hear_left_and_right_the_other_way_round(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText, name: ConditionName
) -> None:
    ours = new_backbone(kind="hunyuan", conditions=(name,))
    released = new_backbone(kind="hunyuan", conditions=(name,), action_labels="released")
    labels = torch.arange(80).reshape(20, 4)
    for pair in labels.split(2):
        conditions = replace(new_conditions(2, 4), actions=pair)
        text = new_text(ours.config.architecture, 2)
        swapped = replace(conditions, actions=torch.from_numpy(swap_sides(pair.numpy())))
        assert torch.equal(forward(released, conditions, text), forward(ours, swapped, text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("camera_prope", {"cameras": None}, "cameras: are missing, the model is steered by them"),
        ("camera_plucker", {"cameras": None}, "cameras: are missing"),
        ("action_timestep", {"actions": None}, "actions: are missing"),
        (
            "action_attention",
            {"actions": torch.zeros(2, 3, dtype=torch.int64)},
            r"actions: are of \(2, 3\) .* \(2, 4\)",
        ),
    ],
)
def test_signals_that_are_missing_or_of_other_frames_are_named(
    new_backbone: NewBackbone,
    new_conditions: NewConditions,
    new_text: NewText,
    kind: str,
    name: ConditionName,
    change: dict[str, Any],
    complaint: str,
) -> None:
    backbone = new_backbone(kind=kind, conditions=(name,))
    text = new_text(backbone.config.architecture, 2)
    with pytest.raises(InputError, match=complaint):
        forward(backbone, replace(new_conditions(2, 4), **change), text, bidirectional=True)


def test_cameras_of_another_count_are_named(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText
) -> None:
    backbone = new_backbone(conditions=("camera_prope",))
    text = new_text(backbone.config.architecture, 2)
    with pytest.raises(
        InputError, match=r"cameras: are of \(2, 5\) streams and frames, expected \(2, 4\) as the latents"
    ):
        forward(backbone, new_conditions(2, 5), text, bidirectional=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 9, 4, 6), (2, 4, 1, 1), (1, 4, 4, 6)], ids=str)
def test_a_first_image_of_another_shape_is_named(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText, kind: str, shape: tuple[int, ...]
) -> None:
    backbone = new_backbone(kind=kind, conditions=("first_image",) if kind == "wan" else ())
    conditions = replace(new_conditions(2, 4), image=first_image(torch.randn(shape)))
    with pytest.raises(InputError, match=r"image: has shape .*, expected \(2, 5, 4, 6\)"):
        forward(backbone, conditions, new_text(backbone.config.architecture, 2))


@pytest.mark.parametrize("label", [-1, 81])
def test_actions_that_are_none_are_named(label: int) -> None:
    with pytest.raises(InputError, match=r"actions: reach from .* to .*, expected labels of 0 to 80"):
        Conditions(actions=torch.tensor([[3, label]]))


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_conditions_are_read_in_float32_under_autocast(
    new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText, kind: str, name: ConditionName
) -> None:
    """As in training: products in bf16, cameras not."""
    backbone, conditions = new_backbone(kind=kind, conditions=(name,)), new_conditions(2, 4)
    text = new_text(backbone.config.architecture, 2)
    exact = forward(backbone, conditions, text)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = forward(backbone, replace(conditions, cameras=new_conditions(2, 4).cameras), text)
    torch.testing.assert_close(mixed.float(), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("names", [("camera_prop",), ("camera_prope", "camera_prope")])
def test_conditions_that_are_unknown_or_named_twice_are_refused(
    new_backbone: NewBackbone, names: tuple[str, ...]
) -> None:
    with pytest.raises(
        ConfigError, match=r"conditions: .*'camera_prope?': expected each at most once, of camera_prope, "
    ):
        new_backbone(conditions=names)
