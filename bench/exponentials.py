"""How many exponentials a GPU makes per second: the floor of what softmaxes over and over.

Each thread raises a few numbers again and again in registers, so that nothing else is waited for.
"""

import functools

import torch
import triton
import triton.language as tl

from .harness import timed

_BLOCK, _CHAINS, _LENGTH = 1024, 4, 1024


@triton.jit
def _exponentials(out, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = offsets.to(tl.float32) * -1e-6
    b, c, d = a - 0.1, a - 0.2, a - 0.3
    for _ in range(LENGTH):  # four chains, so that no exponential waits for the one before
        a, b, c, d = tl.exp2(-a), tl.exp2(-b), tl.exp2(-c), tl.exp2(-d)
    tl.store(out + offsets, a + b + c + d)


@functools.cache
def rate() -> float:
    """exp2 per second of the current device, all cores busy."""
    blocks = 64 * torch.cuda.get_device_properties().multi_processor_count
    out = torch.empty(blocks * _BLOCK, device="cuda")

    def run():
        _exponentials[(blocks,)](out, _LENGTH, _BLOCK)

    run()
    return blocks * _BLOCK * _CHAINS * _LENGTH / min(timed(run) for _ in range(5))
