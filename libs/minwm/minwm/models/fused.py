"""A Wan transformer for inference: the same function in fewer and larger operations, in every context.

Queries, keys and values are one matrix product, and so are the outputs of the branches by position and by camera.
Weights are copied: a model that is trained further is fused again.
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from minwm.errors import ConfigError
from minwm.models import prope
from minwm.models.eight_bit import EightBitLinear
from minwm.models.transformer import Transformer
from minwm.models.wan import Block, Step, Wan


def fuse(model: Transformer, *, eight_bit: bool = False) -> Transformer:
    """The model with fused blocks, for passes without gradient, if it is a Wan.

    Another is returned as it is; raises ConfigError for its products in eight bits.

    eight_bit: products of self-attention and feed-forward are FP8 (minwm.models.eight_bit)
    """
    if not isinstance(model, Wan):
        if eight_bit:
            raise ConfigError(f"eight bits: {type(model).__name__}, expected a Wan")
        return model
    fused = copy.copy(model)
    fused._modules = dict(model._modules)
    fused.blocks = nn.ModuleList(FusedBlock(cast(Block, block), eight_bit) for block in model.blocks)
    return fused


class FusedBlock(nn.Module):
    """One block; takes and gives what `Block` does."""

    def __init__(self, block: Block, eight_bit: bool) -> None:
        super().__init__()
        own = block.self_attn
        outs = [own.o, own.prope_o] if hasattr(own, "prope_o") else [own.o]
        up, _, down = cast(tuple[nn.Linear, nn.Module, nn.Linear], block.ffn)
        product: Callable[[nn.Linear], nn.Module] = EightBitLinear if eight_bit else nn.Identity()
        self.qkv = product(_beside_each_other([own.q, own.k, own.v]))
        self.o, self.up, self.down = product(_summed(outs)), product(up), product(down)
        self.heads, self.modulation = own.heads, block.modulation
        self.norm_q, self.norm_k = own.norm_q, own.norm_k
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.cross_attn = block.cross_attn

    def forward(self, x: Tensor, e0: Tensor, prompt: tuple[Tensor, Tensor], layer: int, step: Step) -> Tensor:
        """x (b, f, n, dim), e0 (b, f, 6, dim) to (b, f, n, dim)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e0).unsqueeze(3).unbind(2)
        grid = x.shape[1:3]
        y = torch.addcmul(shift1, self.norm1(x), 1 + scale1).flatten(1, 2)
        x = torch.addcmul(x, gate1, self._attend(y, layer, step).unflatten(1, grid))
        x = x + self.cross_attn(self.norm3(x).flatten(1, 2), prompt).unflatten(1, grid)
        y = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.down(_gelu(self.up(y))))

    def _attend(self, x: Tensor, layer: int, step: Step) -> Tensor:
        """x (b, f · n, dim) to (b, f · n, dim)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        qkv = self.norm_q(q), self.norm_k(k), v
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv)
        branches = prope.attend(step.context, layer, (q, k, v), step.rotation, step.camera)
        return self.o(torch.cat([branch.flatten(2) for branch in branches if branch is not None], dim=-1))  # type: ignore[no-any-return]


def _beside_each_other(layers: list[nn.Linear]) -> nn.Linear:
    """One layer that gives what the layers give, one after the other."""
    return _linear(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def _summed(layers: list[nn.Linear]) -> nn.Linear:
    """One layer that gives the sum of what the layers give, from what they take, one after the other."""
    weight = torch.cat([layer.weight for layer in layers], dim=1)
    return _linear(weight, torch.stack([layer.bias for layer in layers]).sum(0))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(part.detach(), requires_grad=False) for part in (weight, bias))
    return layer


def _gelu(x: Tensor) -> Tensor:
    """GELU's tanh form, as x · sigmoid(2u): compiled, the exponential takes half as long as a hyperbolic tangent."""
    y = x.float()
    twice = y * (1.5957691216057308 + 0.07135481627159497 * y * y)  # 2·sqrt(2/π), and that times 0.044715
    return (y * torch.sigmoid(twice)).to(x.dtype)
