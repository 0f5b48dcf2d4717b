"""Attention under a mask of frames as one FlexAttention call, for GPUs (Dong et al. 2024, arXiv 2412.05496).

`context.Masked` says who sees whom, frame by frame; from it follows which blocks of queries and keys the kernel
skips, takes whole, or masks inside, without ever laying out a mask of tokens by tokens.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from minwm.models.context import Beside, Masked

BLOCK = 128


def masked_attention(q: Tensor, k: Tensor, v: Tensor, context: Masked, beside: Beside | None = None) -> Tensor:
    """Attention (b, n, h, d) of frames that see each other as the context says, and everything beside them."""
    tokens, ahead, real = q.shape[1] // len(context.positions), 0, None
    if beside is not None:
        keys, values = beside.repeated(q.shape[2])
        k, v = torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)
        ahead, real = keys.shape[1], beside.mask
    mask = block_mask(context, tokens, ahead, real, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled()(q, k, v, block_mask=mask).transpose(1, 2)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)  # all layers of a pass ask for the same
def block_mask(context: Masked, tokens: int, ahead: int, real: Tensor | None, device: torch.device) -> BlockMask:
    """The blocks of `tokens` per frame, behind `ahead` keys that all see, or where `real` (b, ahead) is true.

    A context and a mask are known by identity: neither may be changed in place.
    """
    table = F.pad(context.mask, (1, 0), value=True)
    rows = torch.arange(len(context.mask)).repeat_interleave(tokens)
    columns = torch.cat([torch.zeros(ahead, dtype=torch.int64), 1 + rows])
    always = table.clone()
    always[:, 0] = real is None
    # pairs of tokens that see each other, by block: tokens of each block by frame, times what frames see
    by_row, by_column = _count(rows, table.shape[0]), _count(columns, table.shape[1])
    some = by_row @ table.double() @ by_column.T > 0
    whole = by_row @ always.double() @ by_column.T == BLOCK**2
    table, rows, columns = (x.to(device) for x in (table, rows, columns))
    real = None if real is None else F.pad(real, (0, len(rows)), value=True)

    def visible(stream: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = table[rows[query], columns[key]]
        return seen if real is None else seen & real[stream, key]

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole, device),
        *_listed(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(len(rows), len(columns)),
    )


def _count(owners: Tensor, count: int) -> Tensor:
    """How many tokens of each block are whose: (blocks, count) of owners (n,)."""
    padded = F.pad(F.one_hot(owners, count), (0, 0, 0, -len(owners) % BLOCK))
    return padded.reshape(-1, BLOCK, count).sum(1).double()


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys every block of queries has, and which come first, for (query blocks, key blocks)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None].to(device), order.int()[None, None].to(device)
