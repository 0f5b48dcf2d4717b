"""Which floating-point type a device computes in."""

import time

import pytest
import torch
from torch import Tensor

from minwm.precision import native_dtype

pytestmark = pytest.mark.unit


def _fastest(a: Tensor) -> float:
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        spent.append(time.perf_counter() - started)
    return min(spent)


def test_gpus_compute_in_bf16() -> None:
    assert native_dtype("cuda") is native_dtype(torch.device("cuda", 1)) is torch.bfloat16


def test_a_cpu_computes_in_the_type_that_it_multiplies_many_times_as_fast() -> None:
    """Whatever machine this is; where it matters, the two differ by far more than the factor that is let pass here."""
    factor = torch.randn(192, 192)
    chosen, other = native_dtype(), {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[native_dtype()]
    assert _fastest(factor.to(chosen)) < 2 * _fastest(factor.to(other))
