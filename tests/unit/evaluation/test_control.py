from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minwm.diffusion import flow
from minwm.errors import DataError, TrainingError
from minwm.evaluation.control import ControlMargin, control_margin, derangement
from minwm.geometry.camera import relative_viewmats
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import teacher_forcing
from minwm.models.prope import Cameras
from minwm.training.autoregressive import denoise_given_clean
from minwm.training.draw import Draw

from .conftest import MakeClip

pytestmark = pytest.mark.unit


def test_clips_with_identical_cameras_have_a_margin_of_exactly_zero(backbone: Backbone, make_clip: MakeClip) -> None:
    clips = [make_clip(number, motion=7) for number in range(5)]
    measured = control_margin(backbone, clips, levels=3, batch_size=2)
    assert measured.loss_true == measured.loss_shuffled
    assert (measured.margin, measured.standard_error, measured.true_lower_share) == (0.0, 0.0, 0.0)
    assert not measured.learned


def test_a_model_blind_to_the_camera_has_a_margin_of_exactly_zero(backbone: Backbone, make_clip: MakeClip) -> None:
    for block in backbone.model.blocks:
        torch.nn.init.zeros_(block.self_attn.prope_o.weight)  # type: ignore[union-attr,arg-type]
    assert control_margin(backbone, [make_clip(number) for number in range(3)], levels=2).margin == 0.0


def test_the_losses_are_those_of_teacher_forcing_in_float32(backbone: Backbone, make_clip: MakeClip) -> None:
    first, second = (make_clip(number, latent_frames=8) for number in (1, 2))  # one window fits: its place is known
    measured = control_margin(backbone, [first, second], seed=3, levels=1)
    expected = []
    for own, path in ((first, first), (second, second), (first, second), (second, first)):
        clean = torch.from_numpy(own.latents)[None].float()
        noise = Draw(3, 0, [0 if own is first else 1]).normal("noise", clean.shape[1:])
        sigma = flow.warp(torch.full((1, 8), 0.5), 3.0)
        viewmats = torch.from_numpy(relative_viewmats(path.poses))[None]
        conditions = Conditions(Cameras.track(viewmats, torch.from_numpy(own.intrinsics)[None]))
        prompt = backbone.model.prompt(backbone.encode([own.caption]))
        noisy, context = flow.add_noise(clean, noise, sigma), teacher_forcing(8, backbone.config.history)
        predicted = denoise_given_clean(backbone.model, noisy, clean, sigma, prompt, conditions, context)
        expected.append(float((predicted - (noise - clean)).square().mean()))
    assert measured.loss_true == pytest.approx(np.mean(expected[:2]), rel=5e-3)  # bf16 against float32
    assert measured.loss_shuffled == pytest.approx(np.mean(expected[2:]), rel=5e-3)


def test_the_margin_depends_on_the_seed_alone(backbone: Backbone, make_clip: MakeClip) -> None:
    clips = [make_clip(number) for number in range(3)]
    first = control_margin(backbone, clips, seed=1, levels=2, batch_size=2)
    assert control_margin(backbone, clips, seed=1, levels=2, batch_size=2) == first
    assert control_margin(backbone, clips, seed=2, levels=2, batch_size=2) != first
    assert first.loss_true != first.loss_shuffled
    assert (first.clips, first.pairs) == (3, 6)


def test_fewer_than_two_clips_are_refused(backbone: Backbone, make_clip: MakeClip) -> None:
    with pytest.raises(DataError, match="got 1 clips, expected at least 2"):
        control_margin(backbone, [make_clip(0)])


def test_a_model_that_diverged_is_refused(backbone: Backbone, make_clip: MakeClip) -> None:
    torch.nn.init.constant_(backbone.model.head.head.weight, float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        control_margin(backbone, [make_clip(0), make_clip(1)], levels=1)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(0, 100))
def test_no_window_gets_its_own_poses_and_as_few_as_possible_equal_ones(motions: list[int], seed: int) -> None:
    viewmats = torch.eye(4).repeat(len(motions), 3, 1, 1)
    viewmats[:, 1:, 0, 3] = torch.tensor(motions)[:, None].float()
    donors = derangement(viewmats, torch.Generator().manual_seed(seed)).tolist()
    assert sorted(donors) == list(range(len(motions)))
    assert all(donor != window for window, donor in enumerate(donors))
    equal = sum(motions[window] == motions[donor] for window, donor in enumerate(donors))
    largest = max(Counter(motions).values())
    assert equal == max(0, 2 * largest - len(motions))


@pytest.mark.parametrize(
    ("margin", "words"), [(0.05, "uses the camera"), (0.01, "may be chance"), (-0.05, "Wrong way round")]
)
def test_the_verdict_says_whether_the_margin_is_more_than_chance(margin: float, words: str) -> None:
    measured = ControlMargin(
        loss_true=1.0,
        loss_shuffled=1 + margin,
        margin=margin,
        standard_error=0.01,
        true_lower_share=0.7,
        clips=4,
        pairs=24,
    )
    assert words in measured.verdict()
    assert measured.learned == (margin == 0.05)
