"""FP8 products: which numbers they multiply, and how far off that is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minwm.errors import ConfigError
from minwm.models.eight_bit import EightBitLinear

pytestmark = pytest.mark.unit

ALL = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
FINITE = ALL[ALL.isfinite()].unique()


def nearest(rows: Tensor) -> Tensor:
    """Rows (n, k), each number replaced by the nearest that FP8 has when the row's largest is FP8's."""
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / FINITE.max()
    return FINITE[((rows / scale).unsqueeze(-1) - FINITE).abs().argmin(-1)] * scale


@given(rows=st.integers(0, 9), inputs=st.sampled_from([16, 48, 128]), seed=st.integers(0, 2**31))
def test_it_multiplies_the_nearest_eight_bit_numbers(rows: int, inputs: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, 32).requires_grad_(False)
    layer.weight.normal_(generator=random)
    layer.bias.normal_(generator=random)
    x = torch.randn(rows, inputs, generator=random) * torch.logspace(-3, 3, 9)[:rows, None]  # tokens of any size
    got = EightBitLinear(layer)(x).double()
    expected = nearest(x.double()) @ nearest(layer.weight.double()).T + layer.bias
    size = x.double().norm(dim=1, keepdim=True) * layer.weight.double().norm(dim=1)
    # Beyond the sum's bf16, a number that lies between two may go to either.
    assert ((got - expected).abs() <= 2**-8 * (expected.abs() + layer.bias.abs()) + 2e-3 * size).all()


def test_random_sums_are_right_to_five_percent() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(384, 1152).requires_grad_(False)
    x = torch.randn(2, 3, 96, 384)
    x[0, 0, 0, 5] = 1e4  # takes the precision of its own token, and of no other
    got, exact = EightBitLinear(layer)(x), layer(x)
    assert got.shape == exact.shape and got.dtype == x.dtype
    off = (got - exact).flatten(0, 2).norm(dim=1) / exact.flatten(0, 2).norm(dim=1)
    assert 0.01 < off[1:].max() < 0.05


def test_sizes_that_the_kernels_do_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="a layer of 24 to 32, expected multiples of 16"):
        EightBitLinear(nn.Linear(24, 32))
