"""What the processes of test_distributed run; a module that they can import."""

import os
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from fastffn import ElasticFFN

GENES = ("1x1 tanh(down(gelu(up(x))))", "1x1/2 down(relu(mul(up(x), x)))")


def train(rank: int, world: int, port: int, inputs: torch.Tensor, path: Path) -> None:
    """Two accumulated steps on this rank's share of `inputs`; rank 0 saves the gradients."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world > 1:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    block = ElasticFFN(24, 1, 24, dropout=0.0).double()
    model = DistributedDataParallel(block) if world > 1 else block
    for gene in GENES:  # the second is narrow: its gradient is added to the first one's
        model(inputs[rank::world], gene).square().mul(inputs[rank::world]).mean().backward()
    if rank == 0:
        torch.save([p.grad for p in block.parameters()], path)
    if world > 1:
        distributed.destroy_process_group()
