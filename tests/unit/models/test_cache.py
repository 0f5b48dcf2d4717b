"""The key/value cache: cached, chunk-by-chunk passes equal one masked pass over the whole history."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minwm.models.backbones import Backbone
from minwm.models.cache import CacheGeometry, KVCache
from minwm.models.context import History, Masked, teacher_forcing
from minwm.models.prope import Cameras
from minwm.models.wan import Prompt

pytestmark = pytest.mark.unit

NewBackbone = Callable[[History], Backbone]
NewCameras = Callable[[int, int], Cameras]

FRAMES = 13  # several evictions, and no multiple of the chunks 2 and 3
HISTORIES = [
    History(chunk=chunk, window=window, sink=sink)
    for chunk, window in ((1, 1), (1, 4), (2, 2), (2, 4), (2, 5), (3, 4), (3, 6), (2, 20))
    for sink in (0, 1, 3)
]


@dataclass(frozen=True)
class Stream:
    """Random clean and noisy frames (2, FRAMES, 4, 4, 6), the noise's level per chunk, and the conditions."""

    clean: Tensor
    noisy: Tensor
    timesteps: Tensor
    prompt: Prompt
    cameras: Cameras | None

    def cameras_of(self, start: int, end: int) -> Cameras | None:
        return None if self.cameras is None else self.cameras.frames(start, end)


@pytest.fixture(params=HISTORIES, ids=lambda h: f"chunk{h.chunk}-window{h.window}-sink{h.sink}")
def backbone(request: pytest.FixtureRequest, new_backbone: NewBackbone) -> Backbone:
    return new_backbone(request.param)


@pytest.fixture(params=[True, False], ids=["camera", "no camera"])
def stream(request: pytest.FixtureRequest, backbone: Backbone, new_cameras: NewCameras) -> Stream:
    torch.manual_seed(1)
    clean, noisy = torch.randn(2, 2, FRAMES, 4, 4, 6)
    levels = 1000 * torch.rand(2, FRAMES).repeat_interleave(backbone.config.history.chunk, 1)[:, :FRAMES]
    prompt = backbone.model.prompt(torch.randint(0, 257, (2, 12)))
    return Stream(clean, noisy, levels, prompt, new_cameras(2, FRAMES) if request.param else None)


def assert_equal(got: Tensor, expected: Tensor, frame: int) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4, msg=lambda m: f"frame {frame}: {m}")


def chunks(history: History) -> Iterator[tuple[int, int]]:
    for start in range(0, FRAMES, history.chunk):
        yield start, min(start + history.chunk, FRAMES)


@torch.no_grad()
def test_cached_forward_equals_teacher_forced_forward(backbone: Backbone, stream: Stream) -> None:
    model, history = backbone.model, backbone.config.history
    expected = model(
        torch.cat([stream.clean, stream.noisy], 1),
        torch.cat([torch.zeros(2, FRAMES), stream.timesteps], 1),
        stream.prompt,
        teacher_forcing(FRAMES, history),
        None if stream.cameras is None else stream.cameras.repeat_frames(2),
    )[:, FRAMES:]

    geometry = model.config.cache_geometry(4, 6, history, cameras=stream.cameras is not None)
    cache = KVCache(geometry, 2, torch.float32)
    for start, end in chunks(history):
        context, cameras = cache.context(start, end - start), stream.cameras_of(start, end)
        junk = torch.randn_like(stream.noisy[:, start:end])  # earlier denoising steps leave keys to be overwritten
        model(junk, stream.timesteps[:, start:end], stream.prompt, context, cameras)
        got = model(stream.noisy[:, start:end], stream.timesteps[:, start:end], stream.prompt, context, cameras)
        assert_equal(got, expected[:, start:end], start)
        model(stream.clean[:, start:end], torch.zeros(2, end - start), stream.prompt, context, cameras)


@torch.no_grad()
def test_cached_forward_equals_one_masked_forward_over_the_whole_history(backbone: Backbone, stream: Stream) -> None:
    model, history = backbone.model, backbone.config.history
    mask = torch.zeros(FRAMES, FRAMES, dtype=torch.bool)
    for start, end in chunks(history):
        mask[start:end, max(0, end - history.window) : end] = True
        mask[start:end, : min(history.sink, end)] = True
    expected = model(stream.clean, stream.timesteps, stream.prompt, Masked(range(FRAMES), mask), stream.cameras)

    geometry = model.config.cache_geometry(4, 6, history, cameras=stream.cameras is not None)
    cache = KVCache(geometry, 2, torch.float32)
    for start, end in chunks(history):
        context, cameras = cache.context(start, end - start), stream.cameras_of(start, end)
        got = model(stream.clean[:, start:end], stream.timesteps[:, start:end], stream.prompt, context, cameras)
        assert_equal(got, expected[:, start:end], start)


def test_history_beyond_the_window_is_forgotten(new_backbone: NewBackbone) -> None:
    """Frames that have left the window of every frame in it change nothing; those inside do."""
    backbone = new_backbone(History(chunk=2, window=4))
    model = backbone.model
    torch.manual_seed(0)
    prompt = model.prompt(torch.randint(0, 257, (1, 12)))
    geometry = model.config.cache_geometry(4, 6, backbone.config.history, cameras=False)
    clean = torch.randn(1, 12, 4, 4, 6)

    @torch.no_grad()
    def last_chunk(latents: Tensor) -> Tensor:
        cache = KVCache(geometry, 1, torch.float32)
        for start in range(0, 12, 2):
            out: Tensor = model(latents[:, start : start + 2], torch.zeros(1, 2), prompt, cache.context(start, 2))
        return out

    # two layers look back 2 frames each before the chunk: 6 and later matter, 5 and earlier do not
    long_ago, recent = clean.clone(), clean.clone()
    long_ago[:, 5] += 1
    recent[:, 6] += 1
    assert torch.equal(last_chunk(long_ago), last_chunk(clean))
    assert not torch.allclose(last_chunk(recent), last_chunk(clean), atol=1e-3)


@given(
    chunk=st.integers(1, 3), extra=st.integers(0, 4), sink=st.integers(0, 3), passes=st.integers(1, 8), data=st.data()
)
def test_what_the_cache_hands_out_is_what_the_rule_lets_see(
    chunk: int, extra: int, sink: int, passes: int, data: st.DataObject
) -> None:
    history = History(chunk=chunk, window=chunk + extra, sink=sink)
    geometry = CacheGeometry(layers=1, heads=1, head_dim=1, tokens_per_frame=2, history=history)
    cache = KVCache(geometry, 1, torch.float32)
    for number in range(passes):
        start, end = number * chunk, (number + 1) * chunk
        for _ in range(data.draw(st.integers(1, 2))):  # a chunk may be written again
            tokens = torch.arange(start, end).repeat_interleave(2).float().reshape(1, 1, 1, -1, 1)
            out = cache.update(0, start, chunk, torch.cat([tokens, -tokens]))
        keys, values = out.flatten(1).int().tolist()
        seen = [frame for frame in range(end) if history.sees(end, frame)]
        assert sorted(keys) == [frame for frame in seen for _ in range(2)]
        assert values == [-key for key in keys]


def test_a_pass_with_gradient_leaves_the_cache_as_it_was_and_the_gradient_flows() -> None:
    geometry = CacheGeometry(layers=1, heads=1, head_dim=2, tokens_per_frame=1, history=History(chunk=1, window=2))
    cache = KVCache(geometry, 1, torch.float32)
    committed = torch.randn(2, 1, 1, 1, 2)
    cache.update(0, 0, 1, committed)
    trained = torch.randn(2, 1, 1, 1, 2, requires_grad=True)
    seen = cache.update(0, 1, 1, trained)
    assert torch.equal(seen.detach(), torch.cat([committed, trained.detach()], 3))
    seen[..., 1:, :].square().sum().backward()
    torch.testing.assert_close(trained.grad, 2 * trained.detach())
    stored = cache.update(0, 2, 1, torch.zeros(2, 1, 1, 1, 2))  # frame 2 takes the place of frame 0
    assert torch.equal(stored, torch.zeros(2, 1, 1, 2, 2)), "nothing of the trained pass was kept in frame 1's place"
    assert not stored.requires_grad


def test_the_declared_bytes_are_those_allocated() -> None:
    history = History(chunk=2, window=5, sink=1)
    geometry = CacheGeometry(layers=3, heads=4, head_dim=8, tokens_per_frame=6, history=history)
    cache = KVCache(geometry, 1, torch.bfloat16)
    # keys and values of 1 + 5 frames of 6 tokens, 4 heads of 8 channels, in 3 layers, 2 bytes each
    assert geometry.bytes(torch.bfloat16) == 2 * 6 * 6 * 4 * 8 * 3 * 2
    assert cache._store.untyped_storage().nbytes() == geometry.bytes(torch.bfloat16)
