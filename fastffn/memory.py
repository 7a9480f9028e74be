"""Keeps freed memory in the process while it trains on a CPU.

A training step frees and allocates the same few hundred megabytes again and again. By default
glibc returns large blocks to the system at once, which hands them out again page by page, zeroed:
10% of a step on a virtual machine. With a GPU torch's own allocator does what this does.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """For the block; afterwards glibc's defaults hold again and what is free goes back.

    Without glibc this does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for name, value in _DEFAULTS.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)
