"""Batches of a run in a keyed order, prepared ahead by threads while a step computes.

A run numbers its samples: step s takes the numbers from s · batch to (s + 1) · batch. Which sample of the dataset a
number stands for, and every draw for it, follow from the number and the seed alone, so a run can go on at any step,
and its batches are the same with any number of threads.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from minwm.randomness import generator
from minwm.training.draw import Draw
from minwm.training.parallel import Processes
from minwm.training.run import RunConfig
from minwm.training.stage import Stage


class Samples(Protocol):
    """A dataset to train on: a list, or a reader that several threads may ask at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one process computes at once: the samples' names, their draws, and what the stage prepared of them."""

    names: tuple[str, ...]
    draw: Draw
    content: Any


class Order:
    """An endless order of a dataset's samples, shuffled anew, by key, in every epoch."""

    def __init__(self, seed: int, count: int) -> None:
        self._count = count
        self._epoch = lru_cache(maxsize=2)(  # two, for threads on both sides of an epoch's end
            lambda epoch: torch.randperm(count, generator=generator(seed, epoch, "order")).tolist()
        )

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, self._count)
        return int(self._epoch(epoch)[place])


class Loader:
    """The micro-batches of this process, step by step. Leaving the `with` block ends the threads."""

    def __init__(self, stage: Stage, samples: Samples, run: RunConfig, processes: Processes) -> None:
        self._stage, self._samples, self._run, self._processes = stage, samples, run, processes
        self._order = Order(run.seed, len(samples))
        self._pool = ThreadPoolExecutor(run.loaders, "loader") if run.loaders else None

    def steps(self, first: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of every step from `first` to the run's last; a sample that cannot be read raises here."""
        steps = iter(range(first, self._run.steps))
        if self._pool is None:
            for step in steps:
                yield [self._prepare(step, part) for part in range(self._run.accumulation)]
            return
        coming = deque(self._submit(self._pool, step) for step in islice(steps, self._run.loaders + 1))
        while coming:
            futures = coming.popleft()
            prepared = [future.result() for future in futures]
            coming.extend(self._submit(self._pool, step) for step in islice(steps, 1))
            yield prepared

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[Future[MicroBatch]]:
        return [pool.submit(self._prepare, step, part) for part in range(self._run.accumulation)]

    def _prepare(self, step: int, part: int) -> MicroBatch:
        size = self._run.batch_size // self._run.accumulation
        first = step * self._run.batch_size + part * size
        numbers = self._processes.share(range(first, first + size))
        chosen = [self._samples[self._order[number]] for number in numbers]
        return prepare(self._stage, chosen, Draw(self._run.seed, step, numbers, self._processes.device))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class Cached:
    """Samples kept in memory once read, until `limit` bytes are held.

    Nothing is thrown out: every epoch asks for all samples once, so what was read last is what is wanted last.
    """

    def __init__(self, samples: Samples, size: Callable[[Any], int], limit: float) -> None:
        self._samples, self._size, self._room = samples, size, limit
        self._held: dict[int, Any] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        if index in self._held:
            return self._held[index]
        sample = self._samples[index]
        with self._lock:
            if index not in self._held and self._size(sample) <= self._room:
                self._room -= self._size(sample)
                self._held[index] = sample
        return sample


def prepare(stage: Stage, samples: list[Any], draw: Draw) -> MicroBatch:
    """The micro-batch of samples; one without a name goes by its number in the run."""
    numbered = zip(samples, draw.samples, strict=True)
    names = tuple(str(getattr(sample, "name", number)) for sample, number in numbered)
    return MicroBatch(names, draw, stage.prepare(samples, draw))


def on_device(content: Any, device: torch.device) -> Any:
    """A prepared batch with its tensors on `device`: dataclasses, mappings, sequences and whatever they hold."""
    if device.type == "cpu":
        return content
    if isinstance(content, Tensor):
        return content.to(device, non_blocking=True)
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        fields = {f.name: on_device(getattr(content, f.name), device) for f in dataclasses.fields(content) if f.init}
        return dataclasses.replace(content, **fields)
    if isinstance(content, Mapping):
        return {key: on_device(value, device) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(on_device(value, device) for value in content)
    return content
