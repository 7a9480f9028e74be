"""The processes that train together: torchrun's, accelerate's, or this one alone.

A process group has threads. One that lets go of a tensor while the interpreter ends wants Python's
lock, does not get it, and aborts the process ("terminate called without an active exception"),
which torchrun takes for a failure of the whole run. So they end before: when all processes are
done, `done` leaves the rest to the end of each.
"""

import atexit
import gc
import importlib
import os

import torch
from torch import distributed


class Processes:
    """What one of them must know of all.

    Attributes:
        count: of processes.
        first: whether this one writes files and speaks.
        device: where this one computes.
    """

    def __init__(self):
        from accelerate import PartialState

        # Imported when there is a group, it would keep the group and its threads for ever.
        importlib.import_module("torch._dynamo")
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.count = self._state.num_processes
        self.first = self._state.is_main_process
        self.device = self._state.device
        atexit.unregister(leave)  # of a run before this one

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def done(self) -> None:
        """Waits until all are done; when this process ends, it then leaves the group.

        Not where a run fails: a group that others wait in can only be left by dying.
        """
        self.wait()
        if self.count > 1:
            atexit.register(leave)


def leave() -> None:
    """Ends the process group and its threads; models that hold it must have no other references."""
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def is_first() -> bool:
    """The same before anything is set up."""
    return int(os.environ.get("RANK", 0)) == 0
