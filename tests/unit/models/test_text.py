"""Prompts as bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minwm.errors import InputError
from minwm.models.text import BYTE_VOCABULARY, Embedded, byte_tokens

pytestmark = pytest.mark.unit


@given(prompts=st.lists(st.text(max_size=5), min_size=1, max_size=4), length=st.integers(20, 24))
def test_bytes_can_be_read_back(prompts: list[str], length: int) -> None:
    tokens = byte_tokens(prompts, length)
    assert tokens.shape == (len(prompts), length)
    assert int(tokens.max()) < BYTE_VOCABULARY
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        encoded = prompt.encode()
        assert bytes(token - 1 for token in row[: len(encoded)]) == encoded
        assert row[len(encoded) :] == [0] * (length - len(encoded))


def test_a_prompt_that_is_too_long_is_refused_not_cut() -> None:
    assert byte_tokens(["fünf"], 5).shape == (1, 5)
    with pytest.raises(InputError, match=r"prompt\[1\]: has 6 bytes, expected at most 5"):
        byte_tokens(["fünf", "fünf!"], 5)


@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)], ids=str)
def test_a_mask_that_does_not_go_with_its_states_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(
        InputError, match=r"prompt: has states \(2, 3, 8\) and a mask .*, expected \(b, l, c\), and \(b, l\) of"
    ):
        Embedded(torch.randn(2, 3, 8), mask)
