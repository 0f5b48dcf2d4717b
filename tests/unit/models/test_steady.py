"""Passes at full windows as functions of tensors: they are the model's own, and nothing else goes into them."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from minwm.errors import ConfigError
from minwm.models.backbones import Backbone
from minwm.models.cache import Cached
from minwm.models.combined import join_conditions, join_prompts, together
from minwm.models.conditions import Conditions
from minwm.models.context import History
from minwm.models.fused import fuse
from minwm.models.prope import Cameras
from minwm.models.rollout import ChunkRollout
from minwm.models.steady import Caches, Inputs, SteadyPasses, tensors
from minwm.models.transformer import Prompt, Transformer
from tests.conftest import random_text

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
SHAPE = 4, 4, 6
EVERYTHING = ("camera_prope", "camera_plucker", "camera_attention", "action_attention", "action_timestep")


def steering(seed: int, actions: bool = True) -> Conditions:
    """Two frames' cameras and actions at random."""
    random = torch.Generator().manual_seed(seed)
    viewmats = torch.eye(4).repeat(1, 3, 1, 1)
    viewmats[..., :3, :3] = torch.linalg.qr(torch.randn(1, 3, 3, 3, generator=random))[0]
    viewmats[..., :3, 3] = 2 * torch.randn(1, 3, 3, generator=random)
    cameras = Cameras.track(viewmats[:, 1:], torch.tensor([[0.5, 0.7, 0.5, 0.5]]), viewmats[:, 0])
    return Conditions(cameras, torch.randint(0, 81, (1, 2), generator=random) if actions else None)


class Worlds:
    """Streams of one model, of different age, with the same past each time they are made."""

    def __init__(
        self, backbone: Backbone, model: Transformer, chunks: tuple[int, ...], *, eight_bit: bool = False
    ) -> None:
        history = backbone.config.history
        self.device = next(model.parameters()).device
        self.rollouts = [ChunkRollout(model, history, SHAPE, eight_bit=eight_bit) for _ in chunks]
        texts = [random_text(backbone.config.architecture, 1, seed) for seed in range(len(chunks))]
        self.prompts: list[Prompt] = [model.prompt(text.to(self.device)) for text in texts]
        for stream, (rollout, count) in enumerate(zip(self.rollouts, chunks, strict=True)):
            for chunk in range(count):
                self.commit(stream, rollout, 100 * stream + chunk)

    def commit(self, stream: int, rollout: ChunkRollout, seed: int) -> None:
        clean = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(seed))
        rollout.commit(clean.to(self.device), self.prompts[stream], self.steering(seed))

    def steering(self, seed: int) -> Conditions:
        return steering(seed).to(self.device)

    def contexts(self, window: int | None = None, seed: int = 0) -> list[Cached]:
        numbered = enumerate(self.rollouts, 1000 + seed)
        return [rollout.context(self.steering(number), window) for number, rollout in numbered]

    def arguments(self, seed: int = 0, *, actions: bool = True) -> tuple[Tensor, Tensor, Prompt, Conditions]:
        """Noise, timesteps, prompts and what steers the next chunks."""
        streams = range(len(self.rollouts))
        noise = torch.randn(len(streams), 2, *SHAPE, generator=torch.Generator().manual_seed(7 + seed))
        given = join_conditions([steering(1000 + stream + seed, actions) for stream in streams])
        timesteps = torch.full(noise.shape[:2], 700.0 - seed, device=self.device)
        return noise.to(self.device), timesteps, join_prompts(self.prompts), given.to(self.device)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("history", [History(chunk=2, window=6), History(chunk=2, window=6, sink=2)], ids=str)
@torch.no_grad()
def test_it_is_the_models_own_pass_bit_for_bit(
    new_backbone: NewBackbone, history: History, window: int | None, eight_bit: bool
) -> None:
    """For all conditions, one stream and several, over several chunks, and what they write is the same too."""
    backbone = new_backbone(history=history, conditions=EVERYTHING)
    model = fuse(backbone.model)
    steady = SteadyPasses(model, compiled=False, graphs=False)
    for ages in ((5,), (5, 4, 7)):
        ours, expected = (Worlds(backbone, model, ages, eight_bit=eight_bit) for _ in range(2))
        for turn in range(3):
            noise, timesteps, prompt, given = ours.arguments(turn)
            assert steady.take(ours.contexts(window, turn))
            got = steady(noise, timesteps, prompt, ours.contexts(window, turn), given)
            own = model(noise, timesteps, prompt, together(expected.contexts(window, turn)), given)
            assert torch.equal(got, own)
            for one, other in zip(ours.rollouts, expected.rollouts, strict=True):
                for name, kept in one.cache.state().items():
                    assert torch.equal(kept, other.cache.state()[name]), name
                one.committed(steering(turn))
                other.committed(steering(turn))


def test_streams_that_still_fill_their_windows_or_see_less_than_others_are_not_taken(new_backbone: NewBackbone) -> None:
    backbone = new_backbone(history=History(chunk=2, window=6))
    steady = SteadyPasses(fuse(backbone.model), compiled=False, graphs=False)
    with torch.no_grad():
        worlds = Worlds(backbone, fuse(backbone.model), (1, 2, 3))
    filling, full, fuller = worlds.contexts()
    assert not steady.take([filling])
    assert steady.take([full]) and steady.take([fuller, full])
    assert not steady.take([full, filling])
    narrow = worlds.contexts(4)
    assert steady.take(narrow[1:]) and not steady.take([full, narrow[2]])


@torch.no_grad()
def test_operations_recorded_at_one_chunk_are_those_of_every_later_one(new_backbone: NewBackbone) -> None:
    """What a CUDA graph relies on, without a GPU: all that changes goes in, none of it stays in what was recorded."""
    backbone = new_backbone(history=History(chunk=2, window=6), conditions=EVERYTHING[:3])
    model = fuse(backbone.model)
    worlds, expected = (Worlds(backbone, model, (5, 4)) for _ in range(2))
    recorded: list[Callable[..., Tensor]] = []

    class Replayed(SteadyPasses):
        def function(self, kind: type) -> Callable[[Caches, Inputs], Tensor]:
            run = super().function(kind)

            def replay(held: Caches, inputs: Inputs) -> Tensor:
                if not recorded:
                    recorded.append(_record(run, held, inputs))
                return recorded[0](*tensors(held), *tensors(inputs))

            return replay

    steady = Replayed(model, compiled=False, graphs=False)
    for turn in range(4):
        noise, timesteps, prompt, given = worlds.arguments(turn, actions=False)
        got = steady(noise, timesteps, prompt, worlds.contexts(seed=turn), given)
        own = model(noise, timesteps, prompt, together(expected.contexts(seed=turn)), given)
        assert torch.equal(got, own), f"chunk {turn}"
        for rollout in (*worlds.rollouts, *expected.rollouts):
            rollout.committed(steering(turn))


def _record(run: Callable[[Caches, Inputs], Tensor], held: Caches, inputs: Inputs) -> Callable[..., Tensor]:
    """The pass as the list of its operations on the tensors that go in; the first chunk is not disturbed."""

    def flat(*given: Tensor) -> Tensor:
        left = iter(given)
        return run(_filled(held, left), _filled(inputs, left))

    copies = [tensor.clone() for tensor in (*tensors(held), *tensors(inputs))]
    return make_fx(flat)(*copies)  # type: ignore[no-any-return]


def _filled(tree: Any, left: Iterator[Tensor]) -> Any:
    """The tree with the next tensors in place of its own."""
    if isinstance(tree, Tensor):
        return next(left)
    if isinstance(tree, tuple):
        return tuple(_filled(member, left) for member in tree)
    if is_dataclass(tree):
        return type(tree)(*(_filled(getattr(tree, field.name), left) for field in fields(tree)))
    return tree


def test_what_it_cannot_do_is_refused(new_backbone: NewBackbone) -> None:
    with pytest.raises(ConfigError, match="compiled=True, graphs=False: Hunyuan, expected a Wan"):
        SteadyPasses(new_backbone(kind="hunyuan").model, compiled=True, graphs=False)
    with pytest.raises(ConfigError, match="graphs: model on cpu, expected a CUDA device"):
        SteadyPasses(new_backbone().model, compiled=False, graphs=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@torch.inference_mode()
def test_compiled_it_is_the_same_but_for_rounding_at_every_number_of_streams_and_window(
    new_backbone: NewBackbone,
) -> None:
    backbone = new_backbone(history=History(chunk=2, window=6), conditions=EVERYTHING)
    model = fuse(backbone.model)
    steady = SteadyPasses(model, compiled=True, graphs=False)
    cases = [(ages, window, False) for ages in ((5,), (5, 4), (5, 4, 7)) for window in (None, 4, 2)]
    for ages, window, eight_bit in [*cases, ((5,), None, True)]:
        ours, expected = (Worlds(backbone, model, ages, eight_bit=eight_bit) for _ in range(2))
        noise, timesteps, prompt, given = ours.arguments()
        got = steady(noise, timesteps, prompt, ours.contexts(window), given)
        own = model(noise, timesteps, prompt, together(expected.contexts(window)), given)
        torch.testing.assert_close(got, own, rtol=1e-4, atol=2e-2 if eight_bit else 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_a_captured_graph_gives_what_its_operations_give_one_by_one(new_backbone: NewBackbone) -> None:
    backbone = new_backbone(history=History(chunk=2, window=6))
    model = fuse(backbone.model.cuda())
    steady, plain = (SteadyPasses(model, compiled=False, graphs=graphs) for graphs in (True, False))
    ours, expected = (Worlds(backbone, model, (5, 4)) for _ in range(2))
    for turn in range(3):
        noise, timesteps, prompt, given = ours.arguments(turn)
        got = steady(noise, timesteps, prompt, ours.contexts(seed=turn), given)
        own = plain(noise, timesteps, prompt, expected.contexts(seed=turn), given)
        torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)
        for rollout in (*ours.rollouts, *expected.rollouts):
            rollout.committed(ours.steering(turn))
