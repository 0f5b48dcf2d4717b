"""Every causal stage trains students of any chunk, frame by frame included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minwm.data.clips import Clip
from minwm.errors import InputError
from minwm.models.backbones import Backbone
from minwm.models.context import History
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.batch import WindowConfig, cut_windows
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.ode import Ode, OdeConfig
from minwm.training.stage import Stage
from minwm.training.trajectories import SamplingConfig, TrajectorySet, sample_trajectories

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
STAGES = ("autoregressive", "consistency", "ode", "dmd")


def causal_stage(name: str, new_backbone: NewBackbone, history: History, clips: list[Clip], frames: int) -> Any:
    """A stage, and its samples."""
    backbone, window = new_backbone(history, layers=1), WindowConfig(frames=frames)
    if name == "autoregressive":
        return Autoregressive(AutoregressiveConfig(window=window, context_noise=0.1), backbone), clips
    if name == "consistency":
        return Consistency(ConsistencyConfig(window=window, intervals=8), backbone), clips
    if name == "dmd":
        config = DMDConfig(window=window, score=Path("unused"), steps=(2, 1), rollout_frames=frames + history.chunk)
        dmd = DMD(config, backbone, new_backbone(history, layers=1, seed=2))
        dmd.networks["critic"].load_state_dict(new_backbone(history, layers=1, seed=3).model.state_dict())
        return dmd, clips  # a critic that is still the real score has nothing to say
    config = SamplingConfig(window=window, windows=len(clips), steps=(2, 1), ode_steps=2)
    samples = list(sample_trajectories(backbone, clips, config))
    trajectories = TrajectorySet(samples, history, {1: (1.0,), 2: (1.0, 0.75)}, (1.0, 0.75), "")
    return Ode(OdeConfig(), backbone, trajectories), samples


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(STAGES),
    chunk=st.integers(1, 4),
    chunks=st.integers(2, 3),
    window=st.integers(0, 5),
    sink=st.integers(0, 2),
    step=st.integers(0, 1000),
)
def test_every_causal_stage_has_finite_losses_and_gradients_whatever_the_chunk(
    new_backbone: NewBackbone,
    new_clips: Callable[[int, int], list[Clip]],
    name: str,
    chunk: int,
    chunks: int,
    window: int,
    sink: int,
    step: int,
) -> None:
    history = History(chunk=chunk, window=chunk + window, sink=sink)
    clips = new_clips(2, chunk * (chunks + 1))
    stage: Stage
    stage, samples = causal_stage(name, new_backbone, history, clips, chunk * chunks)
    draw = Draw(0, step, range(2))
    batch = stage.prepare(samples, draw)
    for turn in stage.turns(0):
        loss, _ = stage.loss(turn, batch, draw)
        parameters = list(stage.networks[turn].parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert loss.isfinite(), f"{turn}: {loss}"
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None), turn
        assert any(gradient.any() for gradient in gradients if gradient is not None), f"{turn} would learn nothing"


@pytest.mark.parametrize("name", STAGES)
def test_frames_that_are_no_whole_chunks_are_refused_by_every_causal_stage(
    new_backbone: NewBackbone, new_clips: Callable[[int, int], list[Clip]], name: str
) -> None:
    with pytest.raises(InputError, match="frames=7: expected a multiple of the chunk, 3 latent frames"):
        causal_stage(name, new_backbone, History(chunk=3, window=6), new_clips(1, 12), 7)


def test_a_frame_by_frame_student_has_a_level_for_every_frame(
    new_backbone: NewBackbone, new_clips: Callable[[int, int], list[Clip]]
) -> None:
    backbone = new_backbone(History(chunk=1, window=3), layers=1)
    told: list[torch.Tensor] = []
    backbone.model.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    draw = Draw(0, 0, range(2))
    batch = cut_windows(new_clips(2, 5), draw, WindowConfig(frames=5), backbone.encode)
    Autoregressive(AutoregressiveConfig(window=WindowConfig(frames=5)), backbone).loss("generator", batch, draw)
    assert len(told[0][:, 5:].unique()) == 10
