"""Prompts as bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minwm.models.text import BYTE_VOCABULARY, byte_tokens

pytestmark = pytest.mark.unit


@given(prompts=st.lists(st.text(max_size=20), min_size=1, max_size=4), length=st.integers(1, 24))
def test_bytes_can_be_read_back_up_to_the_length(prompts: list[str], length: int) -> None:
    tokens = byte_tokens(prompts, length)
    assert tokens.shape == (len(prompts), length)
    assert int(tokens.max()) < BYTE_VOCABULARY
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        encoded = prompt.encode()[:length]
        assert bytes(token - 1 for token in row[: len(encoded)]) == encoded
        assert row[len(encoded) :] == [0] * (length - len(encoded))
