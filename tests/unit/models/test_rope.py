"""Rotary positions against complex numbers in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minwm.models.rope import rotate, rotation

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def complex_rotation(
    x: Tensor, frames: list[int], rows: int, columns: int, split: tuple[int, int, int], theta: float
) -> Tensor:
    """x (b, n, h, d) float64: each pair of channels times e^(i·angle), token by token."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()).clone()
    token = 0
    for frame in frames:
        for row in range(rows):
            for column in range(columns):
                pair = 0
                for position, width in zip((frame, row, column), split, strict=True):
                    for i in range(width // 2):
                        angle = torch.tensor(position * theta ** (-2 * i / width), dtype=torch.float64)
                        pairs[:, token, :, pair] *= torch.polar(torch.ones_like(angle), angle)
                        pair += 1
                token += 1
    return torch.view_as_real(pairs).flatten(-2)


@pytest.mark.parametrize(
    ("split", "theta"),
    [((24, 20, 20), 10000.0), ((44, 42, 42), 10000.0), ((8, 4, 4), 10000.0), ((16, 56, 56), 256.0)],
)
def test_rotation_is_a_split_of_complex_phases(split: tuple[int, int, int], theta: float) -> None:
    torch.manual_seed(0)
    frames = [0, 3, 2, 1023]
    x = torch.randn(2, 4 * 2 * 3, 2, sum(split), dtype=torch.float64)
    got = rotate(x.float(), rotation(tuple(frames), 2, 3, split, CPU, theta=theta))
    torch.testing.assert_close(got.double(), complex_rotation(x, frames, 2, 3, split, theta), rtol=0, atol=1e-6)


@given(seed=st.integers(0, 1000), far=st.integers(1_000, 10_000_000), apart=st.integers(-20, 20))
def test_far_frames_see_the_same_relative_positions_as_near_ones(seed: int, far: int, apart: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 64)

    def logit(position: int) -> float:
        rotated_q = rotate(q, rotation((position + apart,), 1, 1, (24, 20, 20), CPU))
        rotated_k = rotate(k, rotation((position,), 1, 1, (24, 20, 20), CPU))
        return float((rotated_q * rotated_k).sum())

    assert logit(far) == pytest.approx(logit(20), abs=2e-5)


def test_rotation_keeps_lengths_and_the_data_type() -> None:
    x = torch.randn(1, 6, 2, 64)
    rotated = rotate(x, rotation((100_000,), 2, 3, (24, 20, 20), CPU))
    assert rotated.dtype == torch.float32
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


def test_what_is_compiled_rotates_in_real_numbers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    x, turns = torch.randn(2, 6, 3, 64), rotation((7,), 2, 3, (24, 20, 20), CPU)
    as_complex = rotate(x, turns)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, turns), as_complex, rtol=0, atol=1e-6)
    each = torch.stack([turns, rotation((9,), 2, 3, (24, 20, 20), CPU)])
    torch.testing.assert_close(rotate(x, each)[0], as_complex[0], rtol=0, atol=1e-6)
