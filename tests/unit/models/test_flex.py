"""FlexAttention's masks against the rule they come from, and its attention against SDPA under the same rule.

On a CPU the kernel has a forward and no backward.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from minwm.models.context import Beside, History, teacher_forcing
from minwm.models.flex import BLOCK, block_mask, masked_attention

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def token_mask(frames: Tensor, tokens: int, real: Tensor | None, ahead: int) -> Tensor:
    """(b, queries, keys): the mask of frames, spelled out for every token, behind keys that are seen where real."""
    spread = frames.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    seen = torch.ones(1, ahead, dtype=torch.bool) if real is None else real
    return torch.cat([seen[:, None].expand(-1, len(spread), -1), spread.expand(len(seen), -1, -1)], dim=2)


@settings(max_examples=12)
@given(
    history=st.builds(
        lambda chunk, more, sink: History(chunk=chunk, window=chunk + more, sink=sink),
        st.integers(1, 3),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    tokens=st.sampled_from((1, 37, 64, 128, 150)),
    ahead=st.sampled_from((0, 5, 130)),
    padded=st.booleans(),
)
def test_the_block_mask_is_the_rule_for_every_token_and_skips_what_nobody_sees(
    history: History, tokens: int, ahead: int, padded: bool
) -> None:
    context = teacher_forcing(2 * history.chunk, history)
    real = torch.arange(ahead) < torch.tensor([[ahead], [ahead // 2]]) if padded and ahead else None
    mask = block_mask(context, tokens, ahead, real, CPU)
    expected = token_mask(context.mask, tokens, real, ahead)
    streams, queries, keys = expected.shape
    assert mask.seq_lengths == (queries, keys)
    assert torch.equal(create_mask(mask.mask_mod, streams, None, queries, keys, "cpu")[:, 0], expected)

    unpadded = token_mask(context.mask, tokens, None, ahead)[0]  # blocks are the same for all streams
    blocks = create_block_mask(lambda b, h, q, k: unpadded[q, k], None, None, queries, keys, "cpu", BLOCK)
    assert torch.equal(mask.to_dense(), blocks.to_dense()), "blocks that are visited"
    whole = F.pad(expected.all(0), (0, -keys % BLOCK, 0, -queries % BLOCK)).unflatten(0, (-1, BLOCK)).all(1)
    whole = whole.unflatten(1, (-1, BLOCK)).all(2)
    if real is not None:
        whole[:, : -(-ahead // BLOCK)] = False  # which keys are real is known inside of a block only
    for row, count, order in zip(whole, mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True):
        assert order[:count].tolist() == row.nonzero().flatten().tolist(), "blocks taken without a mask"


def test_the_layers_of_a_pass_share_one_block_mask() -> None:
    history = History(chunk=2, window=4)
    masks = [block_mask(teacher_forcing(4, history), 7, 0, None, CPU) for _ in range(2)]
    assert masks[0] is masks[1]


@pytest.mark.slow
def test_flex_attention_equals_sdpa_under_the_same_mask() -> None:
    """Windows, sinks and a prompt beside the frames; sizes are the same, so that the kernel is compiled once."""
    torch.manual_seed(0)
    for history in (History(chunk=2, window=4, sink=1), History(chunk=1, window=2), History(chunk=3, window=6)):
        context = teacher_forcing(6, history)
        q, k, v = torch.randn(3, 2, 12 * 50, 4, 16)
        prompt = Beside(*torch.randn(2, 2, 70, 2, 16), torch.arange(70) < torch.tensor([[70], [20]]))
        with torch.no_grad():
            found = masked_attention(q, k, v, context, prompt)
            grouped = context.attend(0, q, k, v, prompt)
        keys, values = prompt.repeated(4)
        all_keys, all_values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        mask = token_mask(context.mask, 50, prompt.mask, 70)[:, None]
        heads_first = (x.transpose(1, 2) for x in (q, all_keys, all_values))
        expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=f"FlexAttention under {history}")
        torch.testing.assert_close(grouped, expected, rtol=0, atol=1e-4, msg=f"groups of frames under {history}")
