"""The processes that train together: torchrun's, accelerate's, or this one alone."""

import os

import torch


class Processes:
    """What one of them must know of all.

    Attributes:
        count: of processes.
        first: whether this one writes files and speaks.
        device: where this one computes.
    """

    def __init__(self):
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.count = self._state.num_processes
        self.first = self._state.is_main_process
        self.device = self._state.device

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()


def is_first() -> bool:
    """The same before anything is set up."""
    return int(os.environ.get("RANK", 0)) == 0
