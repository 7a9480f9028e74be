"""Memory of a process: how much is free, and keeping what it freed while it trains on a CPU.

A training step frees and allocates the same few hundred megabytes again and again. By default
glibc returns large blocks to the system at once, which hands them out again page by page, zeroed:
10% of a step on a virtual machine. With a GPU torch's own allocator does what this does.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


def free_bytes(device: torch.device) -> int:
    """What a device has left: of a GPU also what torch keeps; of a CPU what the machine, or the
    container, has."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(min(_of_machine(), _of_container()))


def _of_container() -> float:
    """What a control group of Linux leaves; no limit where there is none."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        return max(0, int((folder / "memory.max").read_text(encoding="ascii")) - used)
    return float("inf")


def _of_machine() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(
            next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        )
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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
