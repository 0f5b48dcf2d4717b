"""Arrays from the bytes of NumPy's files, read by several threads at once.

NumPy parses a file's header as Python code. In Python 3.11 that fails now and then where the garbage collector lets
another thread parse in the middle of it (https://github.com/python/cpython/issues/106905), so threads take turns.
"""

import io
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_turn = threading.Lock()


def read_array(content: bytes) -> NDArray[Any]:
    """The array of an `.npy` file. Raises ValueError or EOFError for a damaged one."""
    with _turn:
        return np.load(io.BytesIO(content), allow_pickle=False)  # type: ignore[no-any-return]


def read_arrays(content: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file by name. Raises ValueError, EOFError, BadZipFile or zlib.error for a damaged one."""
    with _turn, np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
