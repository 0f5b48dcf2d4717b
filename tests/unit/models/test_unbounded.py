"""Rollouts without end, sinks placed afresh, moved worlds, passes made as one: against an engine that keeps everything.

The slow engine stores the raw keys and values of every frame there ever was, and for each pass places those that the
rule names: the window's where they were made, a sink's at its stated position and camera.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minwm.errors import ConfigError, InputError
from minwm.models.backbones import Backbone
from minwm.models.combined import Together, join_conditions, join_prompts, together
from minwm.models.conditions import Conditions
from minwm.models.context import Beside, History
from minwm.models.prope import invert, transform
from minwm.models.rollout import ChunkRollout, within_reach
from minwm.models.rope import rotate

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
NewConditions = Callable[[int, int], Conditions]
TOKENS = 2 * 3  # of a frame of 4 × 6 latents
TOLERANCE = 3e-5  # float32, velocities of about one


@dataclass
class Slow:
    """The context of frames [start, start + count) of one stream, and the store of all raw ones by (layer, frame)."""

    backbone: Backbone
    conditions: Conditions
    history: History
    start: int
    count: int
    store: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    bidirectional = False

    @property
    def positions(self) -> Sequence[int]:
        return range(self.start, self.start + self.count)

    @property
    def streams(self) -> Sequence[Sequence[int]]:
        return (self.positions,)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        frames = zip(k.split(TOKENS, 1), v.split(TOKENS, 1), strict=True)
        self.store |= {(layer, self.start + i): pair for i, pair in enumerate(frames)}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
        end, sink, window = self.start + self.count, self.history.sink, self.history.window
        keys, values = [k], [v]
        for frame in range(self.start):
            if frame >= sink and frame < end - window:
                continue
            position = max(frame, end - window - sink + frame) if frame < sink else frame
            placed = self._placed(layer, frame, position)
            keys.append(placed[0])
            values.append(placed[1])
        all_keys, all_values = torch.cat(keys, 1).double(), torch.cat(values, 1).double()
        logits = torch.einsum("bihd,bjhd->bhij", q.double(), all_keys) / q.shape[-1] ** 0.5
        return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), all_values).to(q.dtype)

    def _placed(self, layer: int, frame: int, position: int) -> tuple[Tensor, Tensor]:
        k, v = self.store[layer, frame]
        rotation = self.backbone.model.rotation(((position,),), 2, 3, k.device)
        cameras = self.conditions.cameras
        assert cameras is not None
        camera = cameras.frames(frame, frame + 1)
        if frame < self.history.sink:
            camera = within_reach(camera, cameras.frames(0, self.start + self.count), self.history.sink_reach)
        inverse = camera.projection.inverse
        return (
            torch.cat([rotate(k, rotation), transform(k, inverse)], 2),
            torch.cat([v, transform(v, inverse)], 2),
        )


@dataclass
class Stream:
    """One world: noise to predict from, conditions, prompt, and both engines' states."""

    backbone: Backbone
    history: History
    latents: Tensor
    conditions: Conditions
    seed: int = 0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        self.prompt = self.backbone.model.prompt(torch.randint(1, 257, (1, 12), generator=random))
        self.fast = ChunkRollout(self.backbone.model, self.history, (4, 4, 6))
        self.store: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def now(self, start: int) -> tuple[Tensor, Conditions]:
        chunk = slice(start, start + self.history.chunk)
        return self.latents[:, chunk], self.conditions.frames(chunk.start, chunk.stop)

    def slow(self, start: int, level: float) -> Tensor:
        x, seen = self.now(start)
        context = Slow(self.backbone, self.conditions, self.history, start, self.history.chunk, self.store)
        return self.backbone.model(x, torch.full(x.shape[:2], 1000 * level), self.prompt, context, seen)


@pytest.fixture
def new_stream(new_backbone: NewBackbone, new_conditions: NewConditions) -> Callable[..., Stream]:
    def make(history: History, frames: int, seed: int = 0) -> Stream:
        torch.manual_seed(seed)
        backbone = new_backbone(history)
        return Stream(backbone, history, torch.randn(1, frames, 4, 4, 6), new_conditions(1, frames), seed)

    return make


HISTORIES = [
    History(chunk=2, window=4, sink=1),
    History(chunk=2, window=6, sink=2),
    History(chunk=1, window=3, sink=3),
    History(chunk=3, window=5, sink=2, sink_reach=2.0),
    History(chunk=2, window=6),
]


@pytest.mark.parametrize("history", HISTORIES, ids=str)
@torch.no_grad()
def test_a_rollout_of_many_windows_equals_an_engine_that_keeps_all_history(
    new_stream: Callable[..., Stream], history: History
) -> None:
    frames = history.chunk * 12
    stream = new_stream(history, frames)
    for start in range(0, frames, history.chunk):
        x, seen = stream.now(start)
        got, expected = stream.fast.velocity(x, 0.7, stream.prompt, seen), stream.slow(start, 0.7)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE, msg=lambda m, s=start: f"frame {s}: {m}")
        stream.fast.commit(x, stream.prompt, seen)
        stream.slow(start, 0.0)


@pytest.mark.parametrize("history", HISTORIES[1:], ids=str)
@torch.no_grad()
def test_moving_the_worlds_origin_changes_nothing_but_rounding(
    new_stream: Callable[..., Stream], history: History
) -> None:
    """Every fourth chunk the origin goes to where the camera then is, far from where it was."""
    frames = history.chunk * 16
    stream = new_stream(history, frames)
    cameras = stream.conditions.cameras
    assert cameras is not None
    origin = torch.eye(4, dtype=torch.float64)[None]
    for number, start in enumerate(range(0, frames, history.chunk)):
        if number % 4 == 3:
            there = invert(cameras.viewmats[:, start].double())
            stream.fast.move_world((invert(origin) @ there).float())
            origin = there
        x, seen = stream.now(start)
        assert seen.cameras is not None
        moved = replace(seen, cameras=replace(seen.cameras, viewmats=(seen.cameras.viewmats.double() @ origin).float()))
        got = stream.fast.velocity(x, 0.7, stream.prompt, moved)
        torch.testing.assert_close(got, stream.slow(start, 0.7), rtol=0, atol=4 * TOLERANCE)
        stream.fast.commit(x, stream.prompt, moved)
        stream.slow(start, 0.0)


@torch.no_grad()
def test_a_smaller_window_sees_the_last_frames_and_the_sink_and_a_larger_one_comes_back(
    new_stream: Callable[..., Stream],
) -> None:
    history = History(chunk=2, window=8, sink=1)
    random = np.random.default_rng(5)
    stream = new_stream(history, 40)
    for start in range(0, 40, 2):
        window = int(random.choice([2, 4, 6, 8]))
        x, seen = stream.now(start)
        narrow = replace(stream, history=replace(history, window=window))
        narrow.store = stream.store
        times = torch.full((1, 2), 700.0)
        got = stream.backbone.model(x, times, stream.prompt, stream.fast.context(seen, window), seen)
        # the sink stands before the window that the cache has, whatever is seen of it
        expected = _with_sink_before(stream, start, window)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE, msg=lambda m, s=start: f"frame {s}: {m}")
        stream.fast.commit(x, stream.prompt, seen)
        stream.slow(start, 0.0)


def _with_sink_before(stream: Stream, start: int, window: int) -> Tensor:
    class Narrow(Slow):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, beside: Beside | None = None) -> Tensor:
            hidden = {key: pair for key, pair in self.store.items() if self._hidden(key[1])}
            kept = self.store
            self.store = {key: pair for key, pair in kept.items() if key not in hidden}
            end, sink = self.start + self.count, self.history.sink
            keys, values = [k], [v]
            for frame in sorted({number for _, number in self.store if number < self.start}):
                far = end - self.history.window - sink + frame
                placed = self._placed(layer, frame, max(frame, far) if frame < sink else frame)
                keys.append(placed[0])
                values.append(placed[1])
            self.store = kept
            logits = torch.einsum("bihd,bjhd->bhij", q, torch.cat(keys, 1)) / q.shape[-1] ** 0.5
            return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), torch.cat(values, 1))

        def _hidden(self, frame: int) -> bool:
            return frame >= self.history.sink and frame < self.start + self.count - window

    x, seen = stream.now(start)
    context = Narrow(stream.backbone, stream.conditions, stream.history, start, 2, dict(stream.store))
    return stream.backbone.model(x, torch.full((1, 2), 700.0), stream.prompt, context, seen)


def test_a_window_that_is_none_is_refused(new_stream: Callable[..., Stream]) -> None:
    stream = new_stream(History(chunk=2, window=4), 4)
    for window in (1, 6):
        with pytest.raises(InputError, match=f"window={window}: expected from the 2 frames of a pass to the cache's 4"):
            stream.fast.context(stream.now(0)[1], window)
    with pytest.raises(ConfigError, match=r"history\.sink_reach=0"):
        History(chunk=2, window=4, sink=1, sink_reach=0.0)


@torch.no_grad()
def test_streams_at_different_places_advance_in_one_pass_as_each_would_alone(
    new_stream: Callable[..., Stream],
) -> None:
    """Three worlds with poses, prompts and frame counters of their own, of different age."""
    history = History(chunk=2, window=6, sink=1)
    streams = [new_stream(history, 20, seed) for seed in range(3)]
    for ahead, stream in enumerate(streams):
        for start in range(0, 2 + 4 * ahead, 2):
            x, seen = stream.now(start)
            stream.fast.commit(x, stream.prompt, seen)
    prompt = join_prompts([stream.prompt for stream in streams])
    for _ in range(3):
        now = [stream.now(stream.fast.frames) for stream in streams]
        alone = [s.fast.velocity(x, 0.4, s.prompt, seen) for s, (x, seen) in zip(streams, now, strict=True)]
        context = together([s.fast.context(seen) for s, (_, seen) in zip(streams, now, strict=True)])
        conditions = join_conditions([seen for _, seen in now])
        latents = torch.cat([x for x, _ in now])
        got = streams[0].backbone.model(latents, torch.full((3, 2), 400.0), prompt, context, conditions)
        torch.testing.assert_close(got, torch.cat(alone), rtol=0, atol=TOLERANCE)
        for stream, (x, seen) in zip(streams, now, strict=True):
            stream.fast.commit(x, stream.prompt, seen)


@torch.no_grad()
def test_a_chunks_context_and_the_next_ones_first_step_are_one_pass_exactly(new_stream: Callable[..., Stream]) -> None:
    history = History(chunk=2, window=6)
    apart, fused = new_stream(history, 24), new_stream(history, 24)
    times = torch.tensor([[0.0, 0.0, 900.0, 900.0]])
    for start in range(0, 22, 2):
        (x, seen), (noise, following) = apart.now(start), apart.now(start + 2)
        apart.fast.commit(x, apart.prompt, seen)
        expected = apart.fast.velocity(noise, 0.9, apart.prompt, following)

        both, conditions = torch.cat([x, noise], 1), join_conditions([seen, following], dim=1)
        got = fused.backbone.model(both, times, fused.prompt, fused.fast.context_of_both(seen), conditions)[:, 2:]
        fused.fast.committed(seen)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE, msg=lambda m, s=start: f"frame {s}: {m}")


def test_a_sink_behind_the_window_moves_between_two_chunks_which_are_two_passes(
    new_stream: Callable[..., Stream],
) -> None:
    stream = new_stream(History(chunk=2, window=4, sink=1), 8)
    x, seen = stream.now(0)
    with torch.no_grad():
        stream.fast.commit(x, stream.prompt, seen)
    with pytest.raises(InputError, match="sink=1: expected none, or chunks inside the first window"):
        stream.fast.context_of_both(seen)


def test_streams_of_which_one_begins_are_not_put_together(new_stream: Callable[..., Stream]) -> None:
    history = History(chunk=2, window=4)
    first, second = new_stream(history, 8), new_stream(history, 8, 1)
    x, seen = second.now(0)
    second.fast.commit(x, second.prompt, seen)
    with pytest.raises(InputError, match="either all of them or none of them at their beginning"):
        Together([first.fast.context(seen), second.fast.context(seen)])


def test_a_far_sink_is_seen_at_its_reach_in_the_same_direction(new_conditions: NewConditions) -> None:
    cameras = new_conditions(2, 6).cameras
    assert cameras is not None
    sinks, now, reach = cameras.frames(0, 2), cameras.frames(4, 6), 0.1
    near = within_reach(sinks, now, reach)
    here = invert(now.viewmats.double())[:, -1:, :3, 3]
    was, is_ = (invert(one.viewmats.double())[..., :3, 3] - here for one in (sinks, near))
    assert (was.norm(dim=-1) > reach).all(), "the test needs far ones"
    torch.testing.assert_close(is_.norm(dim=-1), torch.full((2, 2), reach, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (torch.nn.functional.cosine_similarity(was, is_, dim=-1) > 0.9999).all()
    assert torch.equal(near.viewmats[..., :3, :3], sinks.viewmats[..., :3, :3]), "it looks where it looked"
    assert within_reach(sinks, now, None) is sinks
    torch.testing.assert_close(within_reach(sinks, now, 1e6).viewmats, sinks.viewmats, rtol=0, atol=1e-5)


def test_an_empty_world_has_no_cameras_to_place(new_backbone: NewBackbone) -> None:
    backbone = new_backbone(History(chunk=1, window=2, sink=1), conditions=("action_timestep",))
    rollout = ChunkRollout(backbone.model, backbone.config.history, (4, 4, 6))
    prompt = backbone.model.prompt(torch.randint(1, 257, (1, 12)))
    for _ in range(5):
        conditions = Conditions(actions=torch.randint(0, 81, (1, 1)))
        with torch.no_grad():
            rollout.commit(torch.randn(1, 1, 4, 4, 6), prompt, conditions)
    assert rollout.frames == 5
    assert rollout.sinks is None
