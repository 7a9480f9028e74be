"""Distributed data parallel training of the fused block equals training in one process."""

import socket

import distributed_checks as checks
import torch
from torch import multiprocessing


def test_two_processes_equal_one(tmp_path):
    inputs = torch.randn(8, 5, 24, dtype=torch.float64)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    checks.train(0, 1, port, inputs, tmp_path / "1.pt")
    multiprocessing.spawn(checks.train, (2, port, inputs, tmp_path / "2.pt"), nprocs=2)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
