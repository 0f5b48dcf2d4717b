"""What the engine is compared with does the same work: the same latents, from the same weights and noise."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minwm.errors import ConfigError, InputError
from minwm.models.backbones import Backbone
from minwm.models.conditions import ConditionName, Conditions
from minwm.models.context import History
from minwm.models.rollout import ChunkRollout
from minwm.models.transformer import Transformer

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).parents[2] / "benchmarks/baseline_loop.py"
NewBackbone = Callable[..., Backbone]
NewConditions = Callable[[int, int], Conditions]
LATENT = (4, 4, 6)
LEVELS = (1.0, 0.6, 0.2)
FRAMES = 12


@pytest.fixture(scope="module")
def loops() -> Iterator[ModuleType]:
    """`benchmarks/baseline_loop.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location("baseline_loop", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture
def noise() -> Tensor:
    """(steps, b, f, c, y, x)."""
    torch.manual_seed(3)
    return torch.randn(len(LEVELS), 2, FRAMES, *LATENT)


def chunks(
    rollout: ChunkRollout, model: Transformer, history: History, conditions: Conditions, noise: Tensor
) -> Tensor:
    """Latents (b, f, c, y, x) of all chunks, each committed before the next."""
    prompt = model.prompt(torch.arange(1, 25).reshape(2, 12))
    made = []
    for start in range(0, FRAMES, history.chunk):
        now = slice(start, start + history.chunk)
        seen = conditions.frames(now.start, now.stop)
        made.append(rollout.denoise(noise[0][:, now], prompt, seen, LEVELS, lambda i, now=now: noise[i + 1][:, now]))
        rollout.commit(made[-1], prompt, seen)
    return torch.cat(made, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("conditions", [("camera_prope",), ()])
@pytest.mark.parametrize("history", [History(chunk=2, window=4), History(chunk=3, window=5)])
def test_the_baseline_makes_the_same_latents_also_after_its_cache_was_shifted(
    loops: ModuleType,
    new_backbone: NewBackbone,
    new_conditions: NewConditions,
    noise: Tensor,
    history: History,
    conditions: tuple[ConditionName, ...],
) -> None:
    model, signals = new_backbone(history, conditions=conditions).model, new_conditions(2, FRAMES)
    want = chunks(ChunkRollout(model, history, LATENT, batch=2), model, history, signals, noise)
    got = chunks(loops.BaselineLoop(model, history, LATENT, batch=2), model, history, signals, noise)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4, msg=lambda text: f"{history}: {text}")


@settings(max_examples=10)
@given(chunk=st.integers(1, 4), more=st.integers(0, 5), sink=st.integers(0, 3), repeats=st.integers(1, 3))
def test_a_shifted_cache_shows_the_sink_and_what_came_last_in_order(
    loops: ModuleType, chunk: int, more: int, sink: int, repeats: int
) -> None:
    """Each chunk is written several times, as every denoising step and the clean context do."""
    capacity = sink + chunk + more
    cache = loops.ShiftedCache(torch.zeros(1, 0, 2, 3), capacity, sink)
    stream = torch.randn(2, 1, 8 * chunk, 2, 3)
    for start in range(0, 8 * chunk, chunk):
        end = start + chunk
        for times in range(repeats, 0, -1):
            keys, values = cache.update(start, *(times * stream[:, :, start:end]))
        seen = [token for token in range(end) if token < sink or token >= end - (capacity - sink)]
        assert torch.equal(keys, stream[0][:, seen]), f"keys before token {end}"
        assert torch.equal(values, stream[1][:, seen]), f"values before token {end}"


@torch.no_grad()
def test_without_a_cache_a_window_gives_what_it_gives_with_one(
    loops: ModuleType, new_backbone: NewBackbone, new_conditions: NewConditions, noise: Tensor
) -> None:
    """The last chunk of the first full window: nothing has been forgotten yet."""
    history = History(chunk=2, window=FRAMES)
    model, conditions = new_backbone(history).model, new_conditions(2, FRAMES)
    prompt = model.prompt(torch.arange(1, 25).reshape(2, 12))
    want = chunks(ChunkRollout(model, history, LATENT, batch=2), model, history, conditions, noise)
    context, last = loops.whole_window(history), noise[:, :, -2:]
    got = loops.without_cache(
        model, context, want[:, :-2], last[0], prompt, conditions, LEVELS, lambda step: last[step + 1]
    )
    torch.testing.assert_close(got, want[:, -2:], rtol=0, atol=2e-4)


def test_a_window_that_is_no_whole_number_of_chunks_begins_within_one(loops: ModuleType) -> None:
    context = loops.whole_window(History(chunk=2, window=5))
    assert list(context.positions) == [1, 2, 3, 4, 5]
    assert context.mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


@torch.no_grad()
def test_the_baseline_refuses_what_it_does_not_do(
    loops: ModuleType, new_backbone: NewBackbone, new_conditions: NewConditions
) -> None:
    history = History(chunk=2, window=4)
    for kind, conditions in (("hunyuan", ("camera_prope",)), ("wan", ("action_timestep",))):
        with pytest.raises(ConfigError, match="expected a Wan steered by camera_prope"):
            loops.BaselineLoop(new_backbone(history, kind=kind, conditions=conditions).model, history, LATENT)
    model = new_backbone(history).model
    rollout, prompt = loops.BaselineLoop(model, history, LATENT), model.prompt(torch.ones(1, 12, dtype=torch.long))
    with pytest.raises(InputError, match="cameras: are missing"):
        rollout.velocity(torch.zeros(1, 2, *LATENT), 1.0, prompt, Conditions())
    rollout.frames = 1023
    with pytest.raises(InputError, match="frames=1025: expected at most 1024"):
        rollout.velocity(torch.zeros(1, 2, *LATENT), 1.0, prompt, new_conditions(1, 2))
