"""The cache of embeddings: what is computed, what is kept, and what a shared folder survives."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from minwm.errors import CheckpointError, InputError
from minwm.models.embeddings import EmbeddingCache, TextEncoder, padded
from minwm.models.text import Embedded

pytestmark = pytest.mark.unit

LENGTH, CHANNELS = 12, 5
prompts = st.text(max_size=LENGTH // 4)  # at most four bytes a character


class ByteStates:
    """An encoder whose state of a byte is a random row for it, and which notes what it was asked."""

    def __init__(self, seed: int = 0, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> None:
        self.identity, self.length = f"bytes, seed {seed}", length
        self.table = torch.randn(256, CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)
        self.asked: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> Embedded:
        self.asked.append(list(prompts))
        if any(len(prompt.encode()) > self.length for prompt in prompts):
            raise InputError("prompt: too long")
        return padded([self.table[list(prompt.encode())] for prompt in prompts], self.length)


def assert_equal(found: Embedded, expected: Embedded) -> None:
    assert found.states.dtype == expected.states.dtype
    assert torch.equal(found.states, expected.states)
    assert torch.equal(found.mask, expected.mask)


@given(lengths=st.lists(st.integers(0, LENGTH), min_size=1, max_size=4))
def test_padded_rows_keep_their_states_and_are_zero_and_masked_behind(lengths: list[int]) -> None:
    rows = [torch.randn(length, CHANNELS) for length in lengths]
    batch = padded(rows, LENGTH)
    assert batch.states.shape == (len(rows), LENGTH, CHANNELS)
    assert batch.mask.sum(1).tolist() == lengths
    for row, states, mask in zip(rows, batch.states, batch.mask, strict=True):
        assert torch.equal(states[mask], row)
        assert mask[: len(row)].all() and not states[~mask].any()


@given(first=st.lists(prompts, min_size=1, max_size=4), second=st.lists(prompts, min_size=1, max_size=4))
def test_cached_states_are_the_encoders_own_and_only_missing_prompts_are_computed_in_one_batch(
    first: list[str], second: list[str]
) -> None:
    with TemporaryDirectory() as folder:
        encoder = ByteStates()
        cache: TextEncoder = EmbeddingCache(Path(folder), encoder)
        for batch in (first, second):
            assert_equal(cache.encode(batch), ByteStates().encode(batch))
        missing = [list(dict.fromkeys(first)), [prompt for prompt in dict.fromkeys(second) if prompt not in first]]
        assert encoder.asked == [batch for batch in missing if batch]


def test_what_one_cache_kept_another_finds(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path / "new" / "folder", ByteStates(dtype=torch.bfloat16)).encode(["lava", ""])
    later = ByteStates(dtype=torch.bfloat16)
    found = EmbeddingCache(tmp_path / "new" / "folder", later).encode(["", "lava"])
    assert later.asked == []
    assert_equal(found, ByteStates(dtype=torch.bfloat16).encode(["", "lava"]))


def test_other_weights_and_other_prompts_share_a_folder_and_nothing_else(tmp_path: Path) -> None:
    encoders = [ByteStates(seed) for seed in (1, 2)]
    for encoder in encoders:
        for prompt in ("a hall", "a hall ", "A hall"):
            assert_equal(EmbeddingCache(tmp_path, encoder).encode([prompt]), encoder.encode([prompt]))
    assert len(list(tmp_path.iterdir())) == 6


def test_padding_is_restored_to_the_length_of_the_encoder_that_asks(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path, ByteStates()).encode(["yard"])
    wider = ByteStates(length=LENGTH + 4)
    assert_equal(EmbeddingCache(tmp_path, wider).encode(["yard"]), ByteStates(length=LENGTH + 4).encode(["yard"]))
    assert wider.asked == []


def test_concurrent_writers_agree_and_leave_complete_files_only(tmp_path: Path) -> None:
    asked = [f"prompt {number % 5}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: EmbeddingCache(tmp_path, ByteStates()).encode([prompt]), asked))
    for prompt, embedded in zip(asked, found, strict=True):
        assert_equal(embedded, ByteStates().encode([prompt]))
    assert len(list(tmp_path.iterdir())) == 5


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_named_not_used(share: float) -> None:
    with TemporaryDirectory() as folder:
        cache = EmbeddingCache(Path(folder), ByteStates())
        cache.encode(["corridor"])
        (path,) = Path(folder).iterdir()
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match=path.name):
            cache.encode(["corridor"])


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.ones(3, CHANNELS)},
        {"states": torch.ones(CHANNELS)},
        {"states": torch.ones(LENGTH + 1, CHANNELS)},
    ],
    ids=["no states", "no rows", "too many rows"],
)
def test_a_file_with_foreign_content_is_named_not_used(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    cache = EmbeddingCache(tmp_path, ByteStates())
    cache.encode(["corridor"])
    (path,) = tmp_path.iterdir()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{path.name}: holds .*, expected \(l, c\) with at most {LENGTH}"):
        cache.encode(["corridor"])


def test_what_the_encoder_refuses_is_not_kept(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, ByteStates())
    with pytest.raises(InputError):
        cache.encode(["fine", "x" * (LENGTH + 1)])
    assert not list(tmp_path.iterdir())
