"""The key/value cache: cached, chunk-by-chunk passes equal one masked pass over the whole history."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minwm.errors import InputError
from minwm.models.backbones import Backbone
from minwm.models.cache import CacheGeometry, EightBitCache, KVCache
from minwm.models.conditions import ConditionName, Conditions
from minwm.models.context import Beside, History, Masked, attention, teacher_forcing
from minwm.models.prope import transform
from minwm.models.rope import rotate, rotation
from minwm.models.transformer import Prompt

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
NewConditions = Callable[[int, int], Conditions]
NewText = Callable[..., Any]

FRAMES = 12
HISTORIES = [
    History(chunk=chunk, window=window, sink=sink)
    for chunk, window in ((1, 1), (1, 4), (2, 2), (2, 4), (2, 5), (3, 4), (3, 6), (4, 4), (4, 6), (2, 20))
    for sink in (0, 1, 3)
]
FEW_HISTORIES = [History(chunk=chunk, window=chunk + 3, sink=chunk % 2) for chunk in (1, 2, 3, 4)]
STEERED: list[tuple[ConditionName, ...]] = [
    (),
    ("camera_prope",),
    ("camera_plucker",),
    ("camera_attention",),
    ("action_attention",),
    ("action_timestep",),
    ("first_image",),
    ("camera_prope", "camera_plucker", "camera_attention", "action_attention", "action_timestep"),
]
CASES = [
    *[("wan", ("camera_prope",), history) for history in HISTORIES],
    *[("wan", steered, history) for steered in STEERED for history in FEW_HISTORIES],
    *[
        ("hunyuan", steered, history)
        for steered in STEERED
        if "first_image" not in steered
        for history in FEW_HISTORIES
    ],
]


@dataclass(frozen=True)
class Stream:
    """Random clean and noisy frames (2, FRAMES, 4, 4, 6), the noise's level per chunk, and what steers them."""

    backbone: Backbone
    clean: Tensor
    noisy: Tensor
    timesteps: Tensor
    prompt: Prompt
    conditions: Conditions

    def new_cache(self) -> KVCache:
        geometry = self.backbone.model.architecture.cache_geometry(4, 6, self.backbone.config.history)
        return KVCache(geometry, 2, torch.float32)


def _name(case: tuple[str, tuple[str, ...], History]) -> str:
    kind, steered, history = case
    return f"{kind}-{'+'.join(steered) or 'alone'}-chunk{history.chunk}-window{history.window}-sink{history.sink}"


@pytest.fixture
def new_stream(new_backbone: NewBackbone, new_conditions: NewConditions, new_text: NewText) -> Callable[..., Stream]:
    def make(kind: str, steered: tuple[str, ...], history: History, **changes: str) -> Stream:
        backbone = new_backbone(history, kind=kind, conditions=steered, **changes)
        torch.manual_seed(1)
        clean, noisy = torch.randn(2, 2, FRAMES, 4, 4, 6)
        levels = 1000 * torch.rand(2, FRAMES // history.chunk).repeat_interleave(history.chunk, 1)
        with torch.no_grad():
            prompt = backbone.model.prompt(new_text(backbone.config.architecture, 2))
        return Stream(backbone, clean, noisy, levels, prompt, new_conditions(2, FRAMES))

    return make


def assert_equal(got: Tensor, expected: Tensor, frame: int) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4, msg=lambda m: f"frame {frame}: {m}")


def chunks(history: History) -> Iterator[tuple[int, int]]:
    for start in range(0, FRAMES, history.chunk):
        yield start, start + history.chunk


@pytest.mark.parametrize("case", CASES, ids=_name)
@torch.no_grad()
def test_cached_forward_equals_teacher_forced_forward(
    new_stream: Callable[..., Stream], case: tuple[str, tuple[str, ...], History]
) -> None:
    stream = new_stream(*case)
    model, history = stream.backbone.model, stream.backbone.config.history
    expected = model(
        torch.cat([stream.clean, stream.noisy], 1),
        torch.cat([torch.zeros(2, FRAMES), stream.timesteps], 1),
        stream.prompt,
        teacher_forcing(FRAMES, history),
        stream.conditions.repeat_frames(2),
    )[:, FRAMES:]

    cache = stream.new_cache()
    for start, end in chunks(history):
        context, conditions = cache.context(start, end - start), stream.conditions.frames(start, end)
        junk = torch.randn_like(stream.noisy[:, start:end])  # earlier denoising steps leave keys to be overwritten
        model(junk, stream.timesteps[:, start:end], stream.prompt, context, conditions)
        got = model(stream.noisy[:, start:end], stream.timesteps[:, start:end], stream.prompt, context, conditions)
        assert_equal(got, expected[:, start:end], start)
        model(stream.clean[:, start:end], torch.zeros(2, end - start), stream.prompt, context, conditions)


@pytest.mark.parametrize("case", CASES, ids=_name)
@torch.no_grad()
def test_cached_forward_equals_one_masked_forward_over_the_whole_history(
    new_stream: Callable[..., Stream], case: tuple[str, tuple[str, ...], History]
) -> None:
    """Not one over the truncated history: deeper layers remember more than the window."""
    stream = new_stream(*case)
    model, history = stream.backbone.model, stream.backbone.config.history
    mask = torch.zeros(FRAMES, FRAMES, dtype=torch.bool)
    for start, end in chunks(history):
        mask[start:end, max(0, end - history.window) : end] = True
        mask[start:end, : min(history.sink, end)] = True
    context = Masked(range(FRAMES), mask)
    expected = model(stream.clean, stream.timesteps, stream.prompt, context, stream.conditions)

    cache = stream.new_cache()
    for start, end in chunks(history):
        part, conditions = slice(start, end), stream.conditions.frames(start, end)
        here = cache.context(start, end - start)
        got = model(stream.clean[:, part], stream.timesteps[:, part], stream.prompt, here, conditions)
        assert_equal(got, expected[:, part], start)


def test_history_beyond_the_window_is_forgotten(new_backbone: NewBackbone) -> None:
    """Frames that have left the window of every frame in it change nothing; those inside do."""
    backbone = new_backbone(History(chunk=2, window=4), conditions=())
    model = backbone.model
    torch.manual_seed(0)
    prompt = model.prompt(torch.randint(0, 257, (1, 12)))
    geometry = model.architecture.cache_geometry(4, 6, backbone.config.history)
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


def test_a_prompt_may_change_between_chunks(new_stream: Callable[..., Stream], new_text: NewText) -> None:
    """What the cache keeps beside the frames is that of the pass, whichever prompts were there before."""
    stream = new_stream("hunyuan", ("camera_prope",), History(chunk=2, window=4))
    model = stream.backbone.model
    with torch.no_grad():
        other = model.prompt(new_text(stream.backbone.config.architecture, 2, seed=9))

    @torch.no_grad()
    def last(prompts: list[Prompt]) -> Tensor:
        cache = stream.new_cache()
        for number, prompt in enumerate(prompts):
            part = slice(2 * number, 2 * number + 2)
            context, conditions = cache.context(part.start, 2), stream.conditions.frames(part.start, part.stop)
            for seen in (other, prompt):  # the first of the two passes is overwritten
                out: Tensor = model(stream.clean[:, part], stream.timesteps[:, part], seen, context, conditions)
        return out

    same, changed = last([stream.prompt] * 3), last([stream.prompt, stream.prompt, other])
    assert not torch.allclose(same, changed, atol=1e-3)
    once_more = last([stream.prompt] * 3)
    assert torch.equal(once_more, same)


@pytest.mark.parametrize(("start", "frames"), [(4, 2), (-2, 2), (0, 6)])
def test_frames_after_a_gap_or_beyond_the_window_are_refused(start: int, frames: int) -> None:
    geometry = CacheGeometry(layers=1, heads=1, head_dim=2, tokens_per_frame=1, history=History(chunk=2, window=4))
    cache = KVCache(geometry, 1, torch.float32)
    cache.update(0, 0, 2, torch.randn(2, 1, 1, 2, 2))
    with pytest.raises(InputError, match=rf"frames {start} to .*: expected at most 4 frames from 2 or earlier"):
        cache.context(start, frames)


def test_a_prompt_longer_than_the_cache_has_room_for_is_refused() -> None:
    history = History(chunk=1, window=1)
    geometry = CacheGeometry(layers=1, heads=1, head_dim=2, tokens_per_frame=1, history=history, beside=3)
    cache = KVCache(geometry, 1, torch.float32)
    keys = torch.randn(1, 4, 1, 2)
    with pytest.raises(InputError, match="prompt: has 4 tokens, expected at most the cache's 3"):
        cache.update(0, 0, 1, torch.randn(2, 1, 1, 1, 2), Beside(keys, keys))


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


def memory(cache: KVCache) -> int:
    """Bytes of all tensors that a cache holds."""
    tensors = [cache._raw, *(tensor for held in cache.held() for tensor in held)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_the_declared_bytes_are_those_allocated() -> None:
    history = History(chunk=2, window=5, sink=1)
    geometry = CacheGeometry(layers=3, heads=4, head_dim=8, tokens_per_frame=6, history=history)
    cache = KVCache(geometry, 1, torch.bfloat16)
    # keys and values of 1 + 5 frames of 6 tokens, and of 1 once more, raw; 4 heads of 8, 3 layers, 2 bytes each
    assert geometry.bytes(torch.bfloat16) == 2 * (6 + 1) * 6 * 4 * 8 * 3 * 2
    assert memory(cache) == geometry.bytes(torch.bfloat16)


@pytest.mark.parametrize("history", FEW_HISTORIES, ids=lambda h: f"chunk{h.chunk}")
@torch.no_grad()
def test_compat_shows_the_attention_by_camera_a_past_that_was_placed_by_position(
    new_stream: Callable[..., Stream], history: History
) -> None:
    """minWM's HunyuanVideo rollout, one layer spelled out: [text | rotated past, not projected | projected chunk]."""
    stream = new_stream("hunyuan", ("camera_prope",), history, prope_history="compat", layers=1)
    model, cameras = stream.backbone.model, stream.conditions.cameras
    assert cameras is not None
    block, config = model.double_blocks[0], model.config
    cache = stream.new_cache()
    assert cache.geometry.heads == config.heads, "one branch is kept"
    past: list[tuple[Tensor, Tensor]] = []
    for start, end in chunks(history):
        x = model.img_in(stream.clean[:, start:end], None, range(start, end))
        if start == 0:
            x = model.img_in(stream.clean[:, start:end], stream.conditions.image, range(start, end))
        vector = model.time_in(stream.timesteps[:, start:end])
        got = model(
            stream.clean[:, start:end],
            stream.timesteps[:, start:end],
            stream.prompt,
            cache.context(start, end - start),
            stream.conditions.frames(start, end),
        )

        beside, modulation = stream.prompt.layers[0], block._modulation("img", vector)
        q, k, v = block._heads("img", x, modulation)
        angles = rotation(range(start, end), 4, 6, config.axes, x.device, theta=config.theta)
        camera = cameras.frames(start, end).projection
        seen = [frame for frame in range(start) if history.sees(end, frame)]
        keys, values = ([past[frame][part] for frame in seen] for part in (0, 1))
        keys, values = [beside.keys, *keys], [beside.values, *values]
        real = beside.key_mask((len(seen) + end - start) * 24)
        rotated = rotate(k, angles)
        turned, all_values = transform(q, camera.matrix.mT), torch.cat([*values, transform(v, camera.inverse)], 1)
        by_position = attention(rotate(q, angles), torch.cat([*keys, rotated], 1), torch.cat([*values, v], 1), real)
        by_camera = attention(turned, torch.cat([*keys, transform(k, camera.inverse)], 1), all_values, real)
        read = block.img_attn_proj(by_position.flatten(2))
        read = read + block.img_attn_prope_proj(transform(by_camera, camera.matrix).flatten(2))
        expected = model.final_layer(block._finish("img", x, modulation, read), vector).mT.unflatten(-1, (4, 6))
        assert_equal(got, expected, start)
        past += zip(rotated.split(24, 1), v.split(24, 1), strict=True)


@torch.no_grad()
def test_exact_and_compat_agree_until_there_is_a_past(new_stream: Callable[..., Stream]) -> None:
    history = History(chunk=2, window=4)
    outputs = []
    for mode in ("exact", "compat"):
        stream = new_stream("hunyuan", ("camera_prope",), history, prope_history=mode)
        cache = stream.new_cache()
        outputs.append(
            [
                stream.backbone.model(
                    stream.clean[:, part],
                    stream.timesteps[:, part],
                    stream.prompt,
                    cache.context(part.start, 2),
                    stream.conditions.frames(part.start, part.stop),
                )
                for part in (slice(0, 2), slice(2, 4))
            ]
        )
    (exact_first, exact_second), (compat_first, compat_second) = outputs
    torch.testing.assert_close(exact_first, compat_first, rtol=0, atol=1e-5)
    assert not torch.allclose(exact_second, compat_second, atol=1e-3)


@pytest.mark.parametrize("history", [History(chunk=2, window=5, sink=1), History(chunk=1, window=3)], ids=str)
@torch.no_grad()
def test_eight_bits_hold_every_number_to_half_a_step(history: History) -> None:
    """Beside a cache that rounds nothing, over several windows; what is beside the frames too."""
    geometry = CacheGeometry(layers=2, heads=3, head_dim=8, tokens_per_frame=2, history=history, beside=3)
    exact, eight = KVCache(geometry, 2, torch.float32), EightBitCache(geometry, 2, torch.float32)
    random = torch.Generator().manual_seed(1)
    beside = Beside(*(torch.randn(2, 2, 3, 8, generator=random) for _ in range(2)))
    for start in range(0, 6 * history.chunk, history.chunk):
        size = 10 ** torch.randn(2, 2, 3, 2 * history.chunk, 1, generator=random)
        kv = size * torch.randn(2, 2, 3, 2 * history.chunk, 8, generator=random)
        for layer in range(2):
            true = exact.update(layer, start, history.chunk, kv, beside)
            got = eight.update(layer, start, history.chunk, kv, beside)
            step = true.abs().amax(-1, keepdim=True) / 127
            assert ((got - true).abs() <= 0.501 * step).all()
    assert memory(eight) == 2 * geometry.bytes(torch.float32, eight_bit=True)


def test_eight_bits_carry_no_gradient() -> None:
    geometry = CacheGeometry(layers=1, heads=1, head_dim=4, tokens_per_frame=1, history=History(chunk=1, window=2))
    with pytest.raises(InputError, match="has eight bits, expected no gradient"):
        EightBitCache(geometry, 1, torch.float32).update(0, 0, 1, torch.randn(2, 1, 1, 1, 4, requires_grad=True))
