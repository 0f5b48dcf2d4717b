"""Arrays are read by threads that the garbage collector interrupts."""

import gc
import io
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from minwm.data.arrays import read_array, read_arrays

pytestmark = pytest.mark.unit


class Knot:
    """Garbage that lets other threads run when it is collected."""

    def __init__(self) -> None:
        self.own = self

    def __del__(self) -> None:
        time.sleep(1e-4)


@pytest.fixture
def eager() -> Iterator[None]:
    """Threads that change often. Whoever asks may change how often garbage is collected."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*thresholds)


def test_threads_read_at_once_while_garbage_is_collected(eager: None) -> None:
    single, several = io.BytesIO(), io.BytesIO()
    array = np.random.default_rng().normal(size=(3, 4))
    np.save(single, array)
    np.savez(several, array=array)

    def read(times: int) -> bool:
        same = []
        for _ in range(times):
            Knot()
            same.append(np.array_equal(read_array(single.getvalue()), array))
            same.append(np.array_equal(read_arrays(several.getvalue())["array"], array))
        return all(same)

    with ThreadPoolExecutor(4) as threads:
        for threshold in range(20, 70, 5):  # objects between collections, so that they hit every place
            gc.set_threshold(threshold)
            assert all(threads.map(read, [50] * 4))
