"""The loader: keyed order, the same batches with any number of threads, errors that arrive, memory that is bounded."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minwm.data.clips import KIND, Clip, ClipReader
from minwm.data.shards import ShardReader, ShardWriter
from minwm.errors import DataError
from minwm.models.text import byte_tokens
from minwm.training.batch import WindowConfig, cut_windows
from minwm.training.draw import Draw
from minwm.training.loader import Cached, Loader, MicroBatch, Order, on_device, prepare
from minwm.training.parallel import Processes
from minwm.training.run import RunConfig

pytestmark = pytest.mark.unit


class Windows:
    """A stage as far as the loader knows one; it can be slow, as decoding is."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.threads = delay, set[str]()

    def prepare(self, samples: list[Clip], draw: Draw) -> Any:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.delay)
        return cut_windows(samples, draw, WindowConfig(frames=4), lambda texts: byte_tokens(texts, 12))


@pytest.fixture
def clips(new_clips: Callable[[int, int], list[Clip]], tmp_path: Path) -> ClipReader:
    """Five clips in two shards."""
    with ShardWriter(tmp_path / "d", KIND, shard_bytes=40_000) as writer:
        for clip in new_clips(5, 6):
            writer.add(clip.name, clip.to_files())
    return ClipReader(ShardReader(tmp_path / "d", KIND), "train")


def batches(samples: Any, first: int = 0, stage: Any = None, **changes: Any) -> list[list[MicroBatch]]:
    run = RunConfig(**{"steps": 6, "batch_size": 4, "accumulation": 2, "loaders": 0, **changes})
    with Loader(stage or Windows(), samples, run, Processes()) as loader:
        return list(loader.steps(first))


@given(seed=st.integers(0, 9), count=st.integers(1, 9), epochs=st.integers(1, 4))
def test_an_epoch_has_every_sample_once_and_any_number_can_be_asked_first(seed: int, count: int, epochs: int) -> None:
    order, backwards = Order(seed, count), Order(seed, count)
    numbers = list(range(epochs * count))
    forward = [order[number] for number in numbers]
    assert all(sorted(forward[start : start + count]) == list(range(count)) for start in numbers[::count])
    assert [backwards[number] for number in reversed(numbers)] == forward[::-1]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("first", [0, 4])
def test_batches_are_the_same_with_any_number_of_threads_from_any_step(
    clips: ClipReader, threads: int, first: int
) -> None:
    expected, found = batches(clips)[first:], batches(clips, first, loaders=threads)
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert [part.names for part in one] == [part.names for part in other], step
        for mine, others in zip(one, other, strict=True):
            assert list(mine.draw.samples) == list(others.draw.samples)
            assert torch.equal(mine.content.latents, others.content.latents), step
            assert torch.equal(mine.content.conditions.cameras.viewmats, others.content.conditions.cameras.viewmats)
            assert torch.equal(mine.content.text, others.content.text)


def test_threads_prepare_ahead_and_end_with_the_run(clips: ClipReader) -> None:
    stage, run = Windows(delay=0.02), RunConfig(steps=8, batch_size=2, loaders=2)
    with Loader(stage, clips, run, Processes()) as loader:
        steps = loader.steps(0)
        next(steps)
        time.sleep(0.2)  # a step that computes
        asked = time.perf_counter()
        next(steps)
        waited = time.perf_counter() - asked
    assert all(name.startswith("loader") for name in stage.threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    assert waited < 0.02, "the batch was ready before it was asked for"


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_shard_is_named_when_its_turn_comes(clips: ClipReader, tmp_path: Path, threads: int) -> None:
    path = tmp_path / "d" / "shard-00001.tar"
    path.write_bytes(b"X" * path.stat().st_size)
    with pytest.raises(DataError, match=r"shard-00001\.tar: clip clip-\d: cannot be read"):
        batches(clips, loaders=threads)


def test_samples_that_fit_are_read_once_and_no_more_is_held() -> None:
    class Counting(list[bytes]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    source = Counting(bytes([n]) * 100 for n in range(5))
    cached = Cached(source, len, limit=350)
    assert len(cached) == 5
    for _ in range(3):
        assert [cached[n] for n in range(5)] == [bytes([n]) * 100 for n in range(5)]
    assert source.reads == 3 + 3 * 2, "three fit; two are read each time"


def test_samples_without_a_name_go_by_their_number(new_clips: Callable[[int, int], list[Clip]]) -> None:
    class Plain:
        def prepare(self, samples: list[Any], draw: Draw) -> int:
            return len(samples)

    clip = new_clips(1, 4)[0]
    assert prepare(Plain(), [clip, 3.5], Draw(0, 2, range(8, 10))).names == ("clip-0", "9")  # type: ignore[arg-type]


def test_whatever_holds_tensors_moves_to_the_device() -> None:
    @dataclass(frozen=True)
    class Inner:
        tensor: Tensor
        name: str

    content = {"a": [Inner(torch.ones(2), "x")], "b": (torch.zeros(1), None, 3)}
    moved = on_device(content, torch.device("meta"))
    assert moved["a"][0].tensor.device.type == moved["b"][0].device.type == "meta"
    assert (moved["a"][0].name, moved["b"][1:]) == ("x", (None, 3))
    assert on_device(content, torch.device("cpu")) is content
