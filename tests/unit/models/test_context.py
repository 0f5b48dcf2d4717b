"""What a pass may look at: the visibility rule, and the teacher-forcing mask against a table of its words."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minwm.errors import ConfigError, InputError
from minwm.models.context import Beside, Full, History, Masked, attention, teacher_forcing

pytestmark = pytest.mark.unit

histories = st.builds(
    lambda chunk, extra, sink: History(chunk=chunk, window=chunk + extra, sink=sink),
    st.integers(1, 4),
    st.integers(0, 7),
    st.integers(0, 3),
)


def allowed_by_the_words(frames: int, history: History) -> torch.Tensor:
    """The rule, one sentence at a time, with chunks as lists of frames."""
    chunks = [list(range(first, first + history.chunk)) for first in range(0, frames, history.chunk)]
    table = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
    for number, chunk in enumerate(chunks):
        earlier = [frame for other in chunks[:number] for frame in other]
        # the window counts back from the chunk's last frame, the chunk's own frames included
        in_window = set(range(chunk[-1] - history.window + 1, chunk[-1] + 1))
        in_sink = set(range(history.sink))
        remembered = [frame for frame in earlier if frame in in_window | in_sink]
        for query in chunk:
            # a clean chunk sees itself and the clean chunks before it
            for key in chunk + remembered:
                table[query, key] = True
            # a noisy chunk sees the clean chunks before it, itself, and neither its own clean nor other noisy frames
            for key in remembered:
                table[frames + query, key] = True
            for key in chunk:
                table[frames + query, frames + key] = True
    return table


@given(chunks=st.integers(1, 6), history=histories)
def test_teacher_forcing_mask_is_the_table_of_its_rule(chunks: int, history: History) -> None:
    frames = chunks * history.chunk
    context = teacher_forcing(frames, history)
    assert torch.equal(context.mask, allowed_by_the_words(frames, history))


@given(chunks=st.integers(1, 6), history=histories)
def test_both_halves_stand_at_the_same_positions(chunks: int, history: History) -> None:
    frames = chunks * history.chunk
    assert list(teacher_forcing(frames, history).positions) == [*range(frames), *range(frames)]


@given(history=histories, frames=st.integers(1, 40))
def test_frames_that_do_not_divide_into_chunks_are_refused(history: History, frames: int) -> None:
    if frames % history.chunk == 0:
        teacher_forcing(frames, history)
        return
    with pytest.raises(InputError, match=f"frames={frames}: expected a multiple of the chunk, {history.chunk} latent"):
        teacher_forcing(frames, history)


@given(history=histories, end=st.integers(1, 40))
def test_a_chunk_sees_its_window_and_the_sink_and_nothing_later(history: History, end: int) -> None:
    seen = {frame for frame in range(60) if history.sees(end, frame)}
    assert seen == {*range(max(0, end - history.window), end), *range(min(history.sink, end))}


@given(history=histories, frame=st.integers(0, 100))
def test_chunk_end_is_the_next_multiple_of_the_chunk(history: History, frame: int) -> None:
    end = history.chunk_end(frame)
    assert end % history.chunk == 0
    assert end - history.chunk <= frame < end


@pytest.mark.parametrize(("chunk", "window", "sink"), [(0, 4, 0), (2, 1, 0), (2, 4, -1)])
def test_an_impossible_history_is_refused_with_its_numbers(chunk: int, window: int, sink: int) -> None:
    with pytest.raises(
        ConfigError, match=f"chunk={chunk}, window={window}, sink={sink}: expected 1 <= chunk <= window"
    ):
        History(chunk=chunk, window=window, sink=sink)


@given(seed=st.integers(0, 1000), frames=st.integers(1, 4), tokens=st.integers(1, 3))
def test_a_frame_mask_holds_for_every_token_of_the_frames(seed: int, frames: int, tokens: int) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, frames * tokens, 2, 8, dtype=torch.float64)
    mask = (torch.rand(frames, frames) < 0.5) | torch.eye(frames, dtype=torch.bool)
    out = Masked(range(frames), mask).attend(0, q, k, v)
    for token in range(frames * tokens):
        keys = [other for other in range(frames * tokens) if mask[token // tokens, other // tokens]]
        logits = torch.einsum("bhd,bnhd->bnh", q[:, token], k[:, keys]) / 8**0.5
        torch.testing.assert_close(out[:, token], torch.einsum("bnh,bnhd->bhd", logits.softmax(1), v[:, keys]))


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), chunks=st.integers(1, 3), tokens=st.integers(1, 3), history=histories)
def test_gradients_under_a_frame_mask_are_those_of_one_masked_call(
    seed: int, chunks: int, tokens: int, history: History
) -> None:
    """Frames that see the same are taken together, without the keys that they don't see."""
    torch.manual_seed(seed)
    context = teacher_forcing(chunks * history.chunk, history)
    inputs = torch.randn(3, 2, len(context.positions) * tokens, 2, 8, dtype=torch.float64, requires_grad=True)
    mask = context.mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    out = context.attend(0, *inputs.unbind(0))
    fused = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, fused)
    weights = torch.randn_like(out)
    found, expected = (torch.autograd.grad((x * weights).sum(), inputs)[0] for x in (out, fused))
    torch.testing.assert_close(found, expected)


@given(seed=st.integers(0, 1000), masked=st.booleans())
def test_what_stands_beside_the_frames_is_seen_by_all_of_them_where_it_is_real(seed: int, masked: bool) -> None:
    """A prompt's keys, of half as many heads as the queries have, against attention spelled out."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 6, 4, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 5, 2, 8, dtype=torch.float64)
    real = torch.arange(5) < torch.tensor([[5], [2]])
    frames = (torch.rand(3, 3) < 0.5) | torch.eye(3, dtype=torch.bool)
    context = Masked(range(3), frames) if masked else Full(3)
    out = context.attend(0, q, k, v, Beside(keys, values, real))
    for stream in range(2):
        for token in range(6):
            own = [other for other in range(6) if not masked or frames[token // 2, other // 2]]
            beside = [other for other in range(5) if real[stream, other]]
            for head in range(4):
                all_keys = torch.cat([k[stream, own, head], keys[stream, beside, head % 2]])
                all_values = torch.cat([v[stream, own, head], values[stream, beside, head % 2]])
                weights = (all_keys @ q[stream, token, head] / 8**0.5).softmax(0)
                torch.testing.assert_close(out[stream, token, head], weights @ all_values)


def test_full_context_is_attention_without_a_mask() -> None:
    q, k, v = torch.randn(3, 2, 6, 2, 8)
    assert torch.equal(Full(3).attend(0, q, k, v), attention(q, k, v))
    assert list(Full(3).positions) == [0, 1, 2]


@given(seed=st.integers(0, 1000), frames=st.integers(1, 4), tokens=st.integers(1, 3), masked=st.booleans())
def test_attention_and_its_gradients_are_the_same_on_the_training_path(
    seed: int, frames: int, tokens: int, masked: bool
) -> None:
    """Where gradients are wanted, short sequences take another road: values and gradients must not notice."""
    torch.manual_seed(seed)
    inputs = torch.randn(3, 2, frames * tokens, 2, 8, dtype=torch.float64, requires_grad=True)
    allowed = (torch.rand(frames * tokens, frames * tokens) < 0.5) | torch.eye(frames * tokens, dtype=torch.bool)
    mask = allowed if masked else None
    trained = attention(*inputs.unbind(0), mask)
    served = attention(*inputs.detach().unbind(0), mask)
    torch.testing.assert_close(trained.detach(), served)

    weights = torch.randn_like(trained)
    (gradient,) = torch.autograd.grad((trained * weights).sum(), inputs)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(gradient, *torch.autograd.grad((fused * weights).sum(), inputs))
