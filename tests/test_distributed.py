"""Distributed data parallel training of the fused block equals training in one process."""

import distributed_checks as checks
import torch
from torch import multiprocessing


def test_two_processes_equal_one(tmp_path):
    inputs = torch.randn(8, 5, 24, dtype=torch.float64)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    checks.train(0, 1, inputs, one)
    multiprocessing.spawn(checks.train, (2, inputs, two), nprocs=2)
    gradients = [torch.load(folder / "gradients.pt", weights_only=True) for folder in (one, two)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
