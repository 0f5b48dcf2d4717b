"""Keeping what PyTorch frees on a CPU for the next pass, which asks for the same again.

Left alone, glibc gives large tensors back to the kernel as soon as they are freed, and each pass pays for fresh pages
one by one: of a decoded chunk that may be half the time. For entry points of processes that compute the same again and
again; such a process stays as large as its largest pass.
"""

import ctypes
import sys

_LARGEST = 1 << 30  # bytes of a tensor that still comes from memory that is kept
_MALLOPT = {"M_MMAP_THRESHOLD": -3, "M_TRIM_THRESHOLD": -1}  # of malloc.h

KEEP_FREED = {
    "MALLOC_ARENA_MAX": "1",  # arenas of other threads than the first are limited in size
    "MALLOC_MMAP_THRESHOLD_": str(_LARGEST),
    "MALLOC_TRIM_THRESHOLD_": str(_LARGEST),
}
"""The environment of a process whose engine runs on a thread of its own."""


def keep_freed_memory() -> None:
    """For what the calling process computes on its main thread. Does nothing where the C library is not glibc."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        for option in _MALLOPT.values():
            libc.mallopt(option, _LARGEST)
