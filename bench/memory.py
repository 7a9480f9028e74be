"""What a call takes of memory at its highest, and how much there is."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_mib(work: Callable) -> float | None:
    """MiB that one call takes beyond what was there, at its highest, its results included.

    On a GPU what torch allocates. On Linux the resident memory, whoever allocates it, after freed
    memory was given back to the system: what a call takes from a heap that others have filled is
    not to be seen otherwise. None where the system does not tell.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not _forget_peak():
        return None
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before) / 2**10


def _forget_peak() -> bool:
    """Gives freed memory back and starts a new record; whether that is possible here."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "malloc_trim"):
        return False
    libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def _resident(name: str) -> int:
    """KiB, by the name that Linux gives it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{name}:\s+(\d+)", status)[1])


def available_bytes(device: str) -> int:
    """Memory that nobody uses; without bound where the system does not tell."""
    if device == "cuda":
        torch.cuda.empty_cache()  # what torch holds for later is free too
        return torch.cuda.mem_get_info()[0]
    try:
        found = re.search(
            r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="ascii")
        )
    except OSError:
        return sys.maxsize
    return int(found[1]) << 10 if found else sys.maxsize
