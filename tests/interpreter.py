"""Runs functions in a process where Triton interprets its kernels, on tensors of the CPU.

Whether a kernel is compiled or interpreted is settled when its module is imported, for the whole
process. Tests that interpret and tests that compile can therefore share one run of pytest (and one
pytest-xdist worker) only if the interpreter has a process of its own: one per worker, started at
the first use.
"""

import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import cache


def _start():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # NumPy reports overflow to infinity and NaN, which the kernels are tested to produce.
    warnings.filterwarnings("ignore", category=RuntimeWarning)


@cache
def _process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_start)


def call(function, *args):
    """`function(*args)` there; its exceptions are raised here with their traceback.

    Args:
        function: one that can be imported by name, from a helper module (not from a test module,
            which pytest imports in its own way).
        args: anything that can be pickled.
    """
    return _process().submit(function, *args).result()
